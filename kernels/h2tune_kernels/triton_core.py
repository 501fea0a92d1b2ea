"""The Triton kernels that take a sparse core from a middle matrix and put one back.

Importing this file imports Triton.
"""

import triton
import triton.language as tl

from h2tune_kernels.triton_parts import this_client, this_tile

__all__ = ["gather_kernel", "scatter_kernel"]


@triton.jit
def gather_kernel(
    middle_ptr,
    index_ptr,
    core_ptr,
    COUNT: tl.constexpr,
    M_C: tl.constexpr,
    I_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """core[j] = middle[index[j]]."""
    TILES: tl.constexpr = (COUNT + BLOCK - 1) // BLOCK
    c = this_client(TILES)
    j = this_tile(TILES) * BLOCK + tl.arange(0, BLOCK)
    mask = j < COUNT
    position = tl.load(index_ptr + c * I_C + j, mask=mask, other=0)
    value = tl.load(middle_ptr + c * M_C + position, mask=mask, other=0.0)
    tl.store(core_ptr + c * COUNT + j, value, mask=mask)


@triton.jit
def scatter_kernel(
    core_ptr,
    index_ptr,
    middle_ptr,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    G_C: tl.constexpr,
    I_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """middle[p] = core[j] where index[j] = p, and zero where no j has it.

    Written from the side of the output: each position looks itself up in the sorted index by
    bisection, so every element is written once, by one thread, and the middle matrix needs neither
    zeroing beforehand nor atomics. Strictly rising positions make j unique.
    """
    TILES: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    c = this_client(TILES)
    p = this_tile(TILES) * BLOCK + tl.arange(0, BLOCK)
    index_ptr += c * I_C
    low = tl.zeros((BLOCK,), tl.int32)
    high = tl.full((BLOCK,), COUNT, tl.int32)
    # Invariant: index[j] < p for j < low, index[j] >= p for j >= high. STEPS halvings close the gap.
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        here = tl.load(index_ptr + middle, mask=middle < high, other=SIZE)
        right = here < p
        low = tl.where(right, middle + 1, low)
        high = tl.where(right, high, middle)
    inside = (low < COUNT) & (p < SIZE)
    found = inside & (tl.load(index_ptr + low, mask=inside, other=-1) == p)
    value = tl.load(core_ptr + c * G_C + low, mask=found, other=0.0)
    tl.store(middle_ptr + c * SIZE + p, value, mask=p < SIZE)

"""What the kernels have in common: where a program stands, widths, rounding, masks, the core.

Importing this file imports Triton.
"""

import triton
import triton.language as tl

__all__ = [
    "EXACT",
    "at_width",
    "below",
    "core_tile",
    "operand",
    "store_rank",
    "this_client",
    "this_tile",
]

# float32 products as three products of the matrix unit: float32's accuracy at a third of tf32's
# rate, where the exact products of the scalar units would need more registers than there are.
# 16-bit operands do not look at it.
EXACT = tl.constexpr("tf32x3")


@triton.jit
def this_client(TILES: tl.constexpr):
    """The client of this program, in 64 bits as offsets need it. See `grid_of`."""
    return (tl.program_id(0) // TILES).to(tl.int64)


@triton.jit
def this_tile(TILES: tl.constexpr):
    """Which of its client's TILES tiles this program does. See `grid_of`."""
    return tl.program_id(0) % TILES


@triton.jit
def at_width(BODY: tl.constexpr, args, rank, RAGGED: tl.constexpr, WIDE: tl.constexpr):
    """Run BODY(*args, W) at the narrowest W of 16, 32, 64 and WIDE that holds `rank`.

    Without RAGGED all ranks are one and W is WIDE. A tile's width is a constant, so each width is
    a body of its own, and BODY stores its result: tiles of several widths have no common type.
    """
    if RAGGED and WIDE > 16 and rank <= 16:
        BODY(*args, 16)
    elif RAGGED and WIDE > 32 and rank <= 32:
        BODY(*args, 32)
    elif RAGGED and WIDE > 64 and rank <= 64:
        BODY(*args, 64)
    else:
        BODY(*args, WIDE)


@triton.jit
def operand(value, STORE: tl.constexpr, UPCAST: tl.constexpr):
    """Round to the storage dtype, then widen if the product has to run in float32."""
    value = value.to(STORE)
    if UPCAST:
        value = value.to(tl.float32)
    return value


@triton.jit
def below(offsets, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """offsets < LIMIT; a constant, which the compiler drops, where BLOCK divides LIMIT."""
    return tl.full(offsets.shape, True, tl.int1) if LIMIT % BLOCK == 0 else offsets < LIMIT


@triton.jit
def core_tile(
    core_ptr,
    index_ptr,
    rank,
    R: tl.constexpr,
    W: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """T or its transpose as a [W, W] tile; SPARSE reads middle[index] in place of T."""
    i = tl.arange(0, W)[:, None]
    j = tl.arange(0, W)[None, :]
    inside = (i < rank) & (j < rank)
    if TRANSPOSE:
        position = j * R + i
    else:
        position = i * R + j
    if SPARSE:
        position = tl.load(index_ptr + position, mask=inside, other=0)
    return tl.load(core_ptr + position, mask=inside, other=0.0)


@triton.jit
def store_rank(
    ptr, value, row_mask, R: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr
):
    """Store a [BM, W] tile into rows of length R and write zero from W up to R."""
    rows = tl.arange(0, BM)[:, None]
    cols = tl.arange(0, W)[None, :]
    tl.store(ptr + rows * R + cols, value, mask=row_mask[:, None] & (cols < R))
    if W < WIDE:
        rest = tl.arange(0, WIDE)[None, :]
        zero = tl.zeros((BM, WIDE), value.dtype)
        tl.store(ptr + rows * R + rest, zero, mask=row_mask[:, None] & (rest >= W) & (rest < R))

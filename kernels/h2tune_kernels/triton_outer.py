"""The Triton kernel of the outer products in the triple product's backward; see triton_triple.py.

Importing this file imports Triton.
"""

import triton
import triton.language as tl

from h2tune_kernels.triton_parts import EXACT, at_width, below, operand, this_client, this_tile

__all__ = ["outer_kernel"]


@triton.jit
def _outer(
    p_ptr,
    q_ptr,
    rank,
    scale,
    out_ptr,
    sum_ptr,
    d,
    t_start,
    t_stop,
    D: tl.constexpr,
    R: tl.constexpr,
    O_D: tl.constexpr,
    O_R: tl.constexpr,
    SUM: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    WIDE: tl.constexpr,
    W: tl.constexpr,
):
    STORE: tl.constexpr = p_ptr.dtype.element_ty
    cols = d + tl.arange(0, BD)
    col_mask = below(cols, D, BD)
    rs = tl.arange(0, W)
    ts = tl.arange(0, BT)
    # Held as [W, BD]: p keeps the order it has in memory, and only the skinny operand is transposed.
    acc = tl.zeros((W, BD), tl.float32)
    total = tl.zeros((BD,), tl.float32)
    p_ptr += t_start.to(tl.int64) * D
    q_ptr += t_start.to(tl.int64) * R
    for step in range(0, ROWS, BT):
        t = step + ts
        inside = t < t_stop - t_start
        p = tl.load(
            p_ptr + t[:, None] * D + cols[None, :],
            mask=inside[:, None] & col_mask[None, :],
            other=0.0,
        )
        q = tl.load(
            q_ptr + t[:, None] * R + rs[None, :],
            mask=inside[:, None] & (rs < rank)[None, :],
            other=0.0,
        )
        if SUM:
            total += tl.sum(p.to(tl.float32), axis=0)
        p = operand(p, STORE, UPCAST)
        acc = tl.dot(tl.trans(operand(q, STORE, UPCAST)), p, acc, input_precision=EXACT)
    acc = (acc * scale).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + cols[None, :] * O_D + rs[:, None] * O_R,
        acc,
        mask=col_mask[None, :] & (rs < R)[:, None],
    )
    if W < WIDE:
        rest = tl.arange(0, WIDE)
        tl.store(
            out_ptr + cols[None, :] * O_D + rest[:, None] * O_R,
            tl.zeros((WIDE, BD), acc.dtype),
            mask=col_mask[None, :] & ((rest >= W) & (rest < R))[:, None],
        )
    if SUM:
        tl.store(sum_ptr + cols, total, mask=col_mask)


@triton.jit
def outer_kernel(
    p_ptr,
    q_ptr,
    scale_ptr,
    ranks_ptr,
    out_ptr,
    sum_ptr,  # None without SUM
    CLIENTS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    P_C: tl.constexpr,
    Q_C: tl.constexpr,
    S_C: tl.constexpr,
    R_C: tl.constexpr,
    O_D: tl.constexpr,
    O_R: tl.constexpr,
    SCALED: tl.constexpr,
    SUM: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[d, j] = scale sum_t p[t, d] q[t, j] over one split of the rows, and sum_t p[t, d].

    p is wide (x, dy, or u), q has the client's rank (du, z, or g). Output is [splits, C, D, R] in
    the order that O_D and O_R give; ROWS rows belong to a split.
    """
    COL_BLOCKS: tl.constexpr = (D + BD - 1) // BD
    SPLITS: tl.constexpr = (N + ROWS - 1) // ROWS
    c = this_client(SPLITS * COL_BLOCKS)
    tile = this_tile(SPLITS * COL_BLOCKS)
    split = tile // COL_BLOCKS
    d = tile % COL_BLOCKS * BD
    p_ptr += c * P_C
    q_ptr += c * Q_C
    slot = split.to(tl.int64) * CLIENTS + c
    out_ptr += slot * (D * R)
    if SUM:
        sum_ptr += slot * D
    t_start = split * ROWS
    t_stop = min(t_start + ROWS, N)
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr + c * S_C)
    rank = R
    if RAGGED:
        rank = tl.load(ranks_ptr + c * R_C)
    at_width(
        _outer,
        (p_ptr, q_ptr, rank, scale, out_ptr, sum_ptr, d, t_start, t_stop, D, R, O_D, O_R, SUM,
         UPCAST, ROWS, BD, BT, WIDE),
        rank, RAGGED, WIDE,
    )  # fmt: skip

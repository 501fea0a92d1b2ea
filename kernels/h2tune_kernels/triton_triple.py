"""The Triton kernels of the sparse triple-matrix product. Importing this file imports Triton.

The forward of one client, s = scale, I kept or dropped:

    u = x A          z = u (I + T)          y = x W + bias + s z B

and with dy the cotangent of y (W is frozen, so there is no dW):

    g  = s dy B^T                       dL/dz
    du = g (I + T)^T                    dL/du
    dx = dy W^T + du A^T
    dA = x^T du      dT = u^T g      dB = s z^T dy      dbias = sum over rows of dy

The two halves mirror each other: (x, A, T, W, B) read forward is (dy, B^T, T^T, W^T, A^T) read
backward. So four kernels do both, told apart by strides:

    down    u, z   from x, A, T     or   g, du  from dy, B^T, T^T        reads the wide input once
    up      s z B + bias            or   du A^T                          writes the wide output once
    fused   down, x W and up in one pass over x, W and y
    outer   x^T du,  (s z^T dy)^T,  u^T g                                reads the wide input once
            (in triton_outer.py)

Rules that hold in all of them:

- Every operand has a client axis; one that all clients share has client stride 0.
- A grid has one axis. In `down`, `up` and `outer`, the tiles of a client are neighbours on it, columns
  before rows, so that its factors stay in cache; the order of `fused` is its own.
- Shapes and strides are compile-time constants, so that the compiler sees their divisibility.
- Inputs are rounded to the dtype of x (`STORE`), products accumulate in float32, and u, z, g, du are
  rounded to the dtype of x before they enter the next product. UPCAST widens the rounded operands
  before each product, for an interpreter that has no bfloat16 product.
- Rank columns at or beyond a client's rank are read as zero and written as zero. With RAGGED, a
  program runs the narrowest of the widths 16, 32, 64, 128 that holds its client's rank, so a client
  pays for its own rank and not for the largest.
- Offsets within a tile, one client's W, or one split's rows are 32 bits; where those start is 64.
- No atomics: every output element has one writer, and sums over splits are summed in order.
"""

import triton
import triton.language as tl

from h2tune_kernels.triton_parts import (
    EXACT,
    at_width,
    below,
    core_tile,
    operand,
    store_rank,
    this_client,
    this_tile,
)

__all__ = ["down_kernel", "fused_kernel", "up_kernel"]


@triton.jit
def _down(
    x_ptr,
    a_ptr,
    core_ptr,
    index_ptr,
    scale,
    rank,
    u_ptr,
    z_ptr,
    row_mask,
    K: tl.constexpr,
    R: tl.constexpr,
    A_K: tl.constexpr,
    A_R: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    SPARSE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
    W: tl.constexpr,
):
    STORE: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.arange(0, BM)
    cols = tl.arange(0, W)
    ks = tl.arange(0, BK)
    acc = tl.zeros((BM, W), tl.float32)
    for k in range(0, K, BK):
        inside = below(k + ks, K, BK)
        x = tl.load(
            x_ptr + rows[:, None] * K + (k + ks)[None, :],
            mask=row_mask[:, None] & inside[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + (k + ks)[:, None] * A_K + cols[None, :] * A_R,
            mask=inside[:, None] & (cols < rank)[None, :],
            other=0.0,
        )
        acc = tl.dot(
            operand(x, STORE, UPCAST), operand(a, STORE, UPCAST), acc, input_precision=EXACT
        )
    u = (acc * scale).to(STORE)
    core = core_tile(core_ptr, index_ptr, rank, R, W, TRANSPOSE, SPARSE)
    z = tl.dot(operand(u, STORE, UPCAST), operand(core, STORE, UPCAST), input_precision=EXACT)
    if RESIDUAL:
        z += u.to(tl.float32)
    store_rank(u_ptr, u, row_mask, R, W, WIDE, BM)
    store_rank(z_ptr, z.to(STORE), row_mask, R, W, WIDE, BM)


@triton.jit
def down_kernel(
    x_ptr,
    a_ptr,
    core_ptr,
    index_ptr,
    scale_ptr,
    ranks_ptr,
    u_ptr,
    z_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    X_C: tl.constexpr,
    A_C: tl.constexpr,
    T_C: tl.constexpr,
    I_C: tl.constexpr,
    S_C: tl.constexpr,
    R_C: tl.constexpr,
    A_K: tl.constexpr,
    A_R: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    SPARSE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """u = scale x A and z = u (I + T) for one client and one block of rows."""
    TILES: tl.constexpr = (N + BM - 1) // BM
    c = this_client(TILES)
    m = this_tile(TILES) * BM
    row_mask = below(m + tl.arange(0, BM), N, BM)
    x_ptr += c * X_C + m.to(tl.int64) * K
    a_ptr += c * A_C
    core_ptr += c * T_C
    index_ptr += c * I_C
    out = (c * N + m) * R
    u_ptr += out
    z_ptr += out
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr + c * S_C)
    rank = R
    if RAGGED:
        rank = tl.load(ranks_ptr + c * R_C)
    at_width(
        _down,
        (x_ptr, a_ptr, core_ptr, index_ptr, scale, rank, u_ptr, z_ptr, row_mask, K, R, A_K, A_R,
         TRANSPOSE, SPARSE, RESIDUAL, UPCAST, BM, BK, WIDE),
        rank, RAGGED, WIDE,
    )  # fmt: skip


@triton.jit
def _up(
    z_ptr,
    b_ptr,
    bias_ptr,
    scale_ptr,
    add_ptr,
    y_ptr,
    rank,
    row_mask,
    n,
    F: tl.constexpr,
    R: tl.constexpr,
    B_R: tl.constexpr,
    B_F: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    W: tl.constexpr,
):
    STORE: tl.constexpr = z_ptr.dtype.element_ty
    rows = tl.arange(0, BM)
    cols = n + tl.arange(0, BN)
    rs = tl.arange(0, W)
    live = rs < rank
    col_mask = below(cols, F, BN)
    mask = row_mask[:, None] & col_mask[None, :]
    z = tl.load(
        z_ptr + rows[:, None] * R + rs[None, :], mask=row_mask[:, None] & live[None, :], other=0.0
    )
    b = tl.load(
        b_ptr + rs[:, None] * B_R + cols[None, :] * B_F,
        mask=live[:, None] & col_mask[None, :],
        other=0.0,
    )
    acc = tl.dot(operand(z, STORE, UPCAST), operand(b, STORE, UPCAST), input_precision=EXACT)
    if SCALED:
        acc *= tl.load(scale_ptr)
    if BIAS:
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    offsets = rows[:, None] * F + cols[None, :]
    if ADD:
        acc += tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def up_kernel(
    z_ptr,
    b_ptr,
    bias_ptr,
    scale_ptr,
    ranks_ptr,
    add_ptr,
    y_ptr,
    N: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    B_C: tl.constexpr,
    BIAS_C: tl.constexpr,
    S_C: tl.constexpr,
    R_C: tl.constexpr,
    B_R: tl.constexpr,
    B_F: tl.constexpr,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    ADD: tl.constexpr,
    RAGGED: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y = scale z B (+ bias) (+ what already stands in y) for one client and one tile."""
    ROW_BLOCKS: tl.constexpr = (N + BM - 1) // BM
    COL_BLOCKS: tl.constexpr = (F + BN - 1) // BN
    c = this_client(ROW_BLOCKS * COL_BLOCKS)
    tile = this_tile(ROW_BLOCKS * COL_BLOCKS)
    m = tile // COL_BLOCKS * BM
    n = tile % COL_BLOCKS * BN
    row_mask = below(m + tl.arange(0, BM), N, BM)
    z_ptr += (c * N + m) * R
    b_ptr += c * B_C
    bias_ptr += c * BIAS_C
    scale_ptr += c * S_C
    out = (c * N + m) * F
    add_ptr += out
    y_ptr += out
    rank = R
    if RAGGED:
        rank = tl.load(ranks_ptr + c * R_C)
    at_width(
        _up,
        (z_ptr, b_ptr, bias_ptr, scale_ptr, add_ptr, y_ptr, rank, row_mask, n, F, R, B_R, B_F,
         BIAS, SCALED, ADD, UPCAST, BM, BN),
        rank, RAGGED, WIDE,
    )  # fmt: skip


@triton.jit
def fused_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    core_ptr,
    index_ptr,
    b_ptr,
    bias_ptr,
    scale_ptr,
    y_ptr,
    u_ptr,
    z_ptr,
    CLIENTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    X_C: tl.constexpr,
    W_C: tl.constexpr,
    A_C: tl.constexpr,
    T_C: tl.constexpr,
    I_C: tl.constexpr,
    B_C: tl.constexpr,
    BIAS_C: tl.constexpr,
    S_C: tl.constexpr,
    W_K: tl.constexpr,
    W_F: tl.constexpr,
    A_K: tl.constexpr,
    A_R: tl.constexpr,
    B_R: tl.constexpr,
    B_F: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    SPARSE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE_DOWN: tl.constexpr,
    SCALE_UP: tl.constexpr,
    BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y = x W + scale z B + bias in one pass; the first column of programs also writes u and z.

    Every program recomputes u for its rows beside x W, from the same x tile: WIDE / BN more
    arithmetic, and not one byte more of x. Rows of all clients are walked in groups of GROUP row
    blocks, column block by column block, so that a tile of W serves neighbouring clients from L2.
    """
    STORE: tl.constexpr = x_ptr.dtype.element_ty
    ROW_BLOCKS: tl.constexpr = (N + BM - 1) // BM
    COL_BLOCKS: tl.constexpr = (F + BN - 1) // BN
    TOTAL: tl.constexpr = ROW_BLOCKS * CLIENTS
    pid = tl.program_id(0)
    group = pid // (GROUP * COL_BLOCKS)
    size = min(TOTAL - group * GROUP, GROUP)
    within = pid % (GROUP * COL_BLOCKS)
    row_block = group * GROUP + within % size
    col_block = within // size
    client = row_block // ROW_BLOCKS
    m = (row_block % ROW_BLOCKS) * BM
    n = col_block * BN
    c = client.to(tl.int64)

    rows = tl.arange(0, BM)
    cols = n + tl.arange(0, BN)
    rs = tl.arange(0, WIDE)
    ks = tl.arange(0, BK)
    row_mask = below(m + rows, N, BM)
    col_mask = below(cols, F, BN)
    x_ptr += c * X_C + m.to(tl.int64) * K
    w_ptr += c * W_C
    a_ptr += c * A_C
    acc = tl.zeros((BM, BN), tl.float32)
    acc_u = tl.zeros((BM, WIDE), tl.float32)
    for k in range(0, K, BK):
        inside = below(k + ks, K, BK)
        x = tl.load(
            x_ptr + rows[:, None] * K + (k + ks)[None, :],
            mask=row_mask[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + (k + ks)[:, None] * W_K + cols[None, :] * W_F,
            mask=inside[:, None] & col_mask[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + (k + ks)[:, None] * A_K + rs[None, :] * A_R,
            mask=inside[:, None] & (rs < R)[None, :],
            other=0.0,
        )
        x = operand(x, STORE, UPCAST)
        acc = tl.dot(x, operand(w, STORE, UPCAST), acc, input_precision=EXACT)
        acc_u = tl.dot(x, operand(a, STORE, UPCAST), acc_u, input_precision=EXACT)
    if SCALE_DOWN:
        acc_u *= tl.load(scale_ptr + c * S_C)
    u = acc_u.to(STORE)
    core = core_tile(core_ptr + c * T_C, index_ptr + c * I_C, R, R, WIDE, TRANSPOSE, SPARSE)
    z = tl.dot(operand(u, STORE, UPCAST), operand(core, STORE, UPCAST), input_precision=EXACT)
    if RESIDUAL:
        z += u.to(tl.float32)
    b = tl.load(
        b_ptr + c * B_C + rs[:, None] * B_R + cols[None, :] * B_F,
        mask=(rs < R)[:, None] & col_mask[None, :],
        other=0.0,
    )
    # acc holds x W already, so the scale has to go in before this product: into z, in float32.
    scaled = z
    if SCALE_UP:
        scaled = z * tl.load(scale_ptr + c * S_C)
    acc = tl.dot(
        operand(scaled, STORE, UPCAST), operand(b, STORE, UPCAST), acc, input_precision=EXACT
    )
    if BIAS:
        bias = tl.load(bias_ptr + c * BIAS_C + cols, mask=col_mask, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    tile = (c * N + m) * F
    tl.store(
        y_ptr + tile + rows[:, None] * F + cols[None, :],
        acc.to(STORE),
        mask=row_mask[:, None] & col_mask[None, :],
    )
    if col_block == 0:
        skinny = (c * N + m) * R
        store_rank(u_ptr + skinny, u, row_mask, R, WIDE, WIDE, BM)
        store_rank(z_ptr + skinny, z.to(STORE), row_mask, R, WIDE, WIDE, BM)

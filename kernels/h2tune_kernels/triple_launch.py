"""The sparse triple-matrix product as a sequence of kernel launches round the product x W.

Three plans (docs/kernels.md counts their bytes):

    fused     one launch of ours does x W and the adapter in one pass over x, W and y
    around    the adapter goes first and writes y0 = s z B + bias; the vendor's x W then adds y0 in
              its own epilogue, which XLA fuses
    inplace   the vendor's x W goes first, and the adapter adds to y where it stands

The backward of each is the same plan with the mirrored operands (see triton_triple.py), and `outer`
for the three weight gradients. u and z are kept for it: they are 2 r / D of the bytes of x, while
to make them again x has to be read again.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from h2tune_kernels.blocks import Problem, Table, blocks_for, plan_for, rank_width
from h2tune_kernels.core import gather_launch
from h2tune_kernels.dispatch import client_stride, clients_of
from h2tune_kernels.launch import Launch, Launcher, grid_of

__all__ = ["Gradients", "Operands", "backward", "forward"]


class Operands(NamedTuple):
    """What one product takes, for C clients; a leading 1 in place of C means shared by all."""

    x: jax.Array  # [C, n, D]
    w: jax.Array  # [C, D, F]
    a: jax.Array  # [C, D, r]
    core: jax.Array  # [C, r, r], or the middle matrix [C, R, R] that `positions` picks from
    positions: jax.Array | None  # i32[C, r*r]
    b: jax.Array  # [C, r, F]
    bias: jax.Array | None  # [C, F]
    scale: jax.Array  # f32[C]
    ranks: jax.Array | None  # i32[C]


class Gradients(NamedTuple):
    """Cotangents of the trained operands, for C clients. `core` is dense [C, r, r] always."""

    x: jax.Array  # [C, n, D]
    a: jax.Array  # [C, D, r]
    core: jax.Array  # [C, r, r]
    b: jax.Array  # [C, r, F]
    bias: jax.Array | None  # [C, F]


class _Call(NamedTuple):
    """What the launches of one product share."""

    launcher: Launcher
    clients: int
    device: str
    upcast: bool
    residual: bool
    plan: str | None
    table: Table | None


def _problem(call: _Call, o: Operands, k: int, f: int) -> Problem:
    n, r, itemsize = o.x.shape[1], o.a.shape[-1], jnp.dtype(o.x.dtype).itemsize
    return Problem(call.device, call.clients, n, k, f, r, itemsize)


def _down(
    call: _Call, o: Operands, x: jax.Array, matrix: jax.Array, mirrored: bool
) -> tuple[jax.Array, jax.Array]:
    """u = x A, z = u (I + T); mirrored: g = s dy B^T, du = g (I + T)^T."""
    clients, n, k, r = call.clients, x.shape[1], x.shape[2], o.a.shape[-1]
    blocks = blocks_for("down", _problem(call, o, k, 0), call.table)
    out = jax.ShapeDtypeStruct((clients, n, r), x.dtype)
    u, z = call.launcher(
        Launch(
            kernel=_kernels().down_kernel,
            grid=grid_of(clients, -(-n // blocks.rows)),
            out_shapes=(out, out),
            constants={
                "N": n,
                "K": k,
                "R": r,
                "X_C": client_stride(x),
                "A_C": client_stride(matrix),
                "T_C": client_stride(o.core),
                "I_C": 0 if o.positions is None else client_stride(o.positions),
                "S_C": client_stride(o.scale),
                "R_C": 0 if o.ranks is None else client_stride(o.ranks),
                "A_K": 1 if mirrored else r,
                "A_R": k if mirrored else 1,
                "TRANSPOSE": mirrored,
                "SPARSE": o.positions is not None,
                "RESIDUAL": call.residual,
                "SCALED": mirrored,
                "RAGGED": o.ranks is not None,
                "UPCAST": call.upcast,
                "BM": blocks.rows,
                "BK": blocks.step,
                "WIDE": rank_width(r),
            },
            blocks=blocks,
        ),
        x,
        matrix,
        o.core,
        x if o.positions is None else o.positions,
        o.scale,
        x if o.ranks is None else o.ranks,
    )
    return u, z


def _up(
    call: _Call,
    o: Operands,
    z: jax.Array,
    matrix: jax.Array,
    mirrored: bool,
    add: jax.Array | None = None,
) -> jax.Array:
    """s z B + bias (+ add, in its own buffer); mirrored: du A^T (+ add)."""
    clients, n, r = z.shape
    f = matrix.shape[1] if mirrored else matrix.shape[2]
    blocks = blocks_for("up", _problem(call, o, 0, f), call.table)
    bias = None if mirrored else o.bias
    (y,) = call.launcher(
        Launch(
            kernel=_kernels().up_kernel,
            grid=grid_of(clients, -(-n // blocks.rows), -(-f // blocks.wide)),
            out_shapes=(jax.ShapeDtypeStruct((clients, n, f), z.dtype),),
            constants={
                "N": n,
                "F": f,
                "R": r,
                "B_C": client_stride(matrix),
                "BIAS_C": 0 if bias is None else client_stride(bias),
                "S_C": client_stride(o.scale),
                "R_C": 0 if o.ranks is None else client_stride(o.ranks),
                "B_R": 1 if mirrored else f,
                "B_F": r if mirrored else 1,
                "BIAS": bias is not None,
                "SCALED": not mirrored,
                "ADD": add is not None,
                "RAGGED": o.ranks is not None,
                "UPCAST": call.upcast,
                "BM": blocks.rows,
                "BN": blocks.wide,
                "WIDE": rank_width(r),
            },
            blocks=blocks,
            aliases={} if add is None else {5: 0},
        ),
        z,
        matrix,
        z if bias is None else bias,
        o.scale,
        z if o.ranks is None else o.ranks,
        z if add is None else add,
    )
    return y


def _fused(
    call: _Call, o: Operands, x: jax.Array, mirrored: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y, u, z) in one pass; mirrored: (dx, g, du) from dy."""
    clients, n, k, r = call.clients, x.shape[1], x.shape[2], o.a.shape[-1]
    f = o.w.shape[1] if mirrored else o.w.shape[2]
    blocks = blocks_for("fused", _problem(call, o, k, f), call.table)
    # Masters in float32 are rounded beforehand here, and not on the way in: operands of the matrix
    # unit that need a conversion would have to pass through registers in every step.
    first, second = (o.b, o.a) if mirrored else (o.a, o.b)
    bias = None if mirrored else o.bias
    y, u, z = call.launcher(
        Launch(
            kernel=_kernels().fused_kernel,
            grid=grid_of(clients, -(-n // blocks.rows), -(-f // blocks.wide)),
            out_shapes=(
                jax.ShapeDtypeStruct((clients, n, f), x.dtype),
                jax.ShapeDtypeStruct((clients, n, r), x.dtype),
                jax.ShapeDtypeStruct((clients, n, r), x.dtype),
            ),
            constants={
                "CLIENTS": clients,
                "N": n,
                "K": k,
                "F": f,
                "R": r,
                "X_C": client_stride(x),
                "W_C": client_stride(o.w),
                "A_C": client_stride(first),
                "T_C": client_stride(o.core),
                "I_C": 0 if o.positions is None else client_stride(o.positions),
                "B_C": client_stride(second),
                "BIAS_C": 0 if bias is None else client_stride(bias),
                "S_C": client_stride(o.scale),
                "W_K": 1 if mirrored else f,
                "W_F": k if mirrored else 1,
                "A_K": 1 if mirrored else r,
                "A_R": k if mirrored else 1,
                "B_R": 1 if mirrored else f,
                "B_F": r if mirrored else 1,
                "TRANSPOSE": mirrored,
                "SPARSE": o.positions is not None,
                "RESIDUAL": call.residual,
                "SCALE_DOWN": mirrored,
                "SCALE_UP": not mirrored,
                "BIAS": bias is not None,
                "UPCAST": call.upcast,
                "BM": blocks.rows,
                "BN": blocks.wide,
                "BK": blocks.step,
                "GROUP": 8,
                "WIDE": rank_width(r),
            },
            blocks=blocks,
        ),
        x,
        o.w,
        first.astype(x.dtype),
        o.core,
        x if o.positions is None else o.positions,
        second.astype(x.dtype),
        x if bias is None else bias,
        o.scale,
    )
    return y, u, z


def _outer(
    call: _Call,
    o: Operands,
    wide: jax.Array,
    skinny: jax.Array,
    dtype: Any,
    *,
    transposed: bool,
    scaled: bool = False,
    total: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """(scale wide^T skinny, [C, d, r] or transposed [C, r, d]; the sum of wide over its rows)."""
    clients, d = call.clients, wide.shape[-1]
    n, r = skinny.shape[1:]
    blocks = blocks_for("outer", _problem(call, o, 0, d), call.table)
    # A split's rows are a whole number of steps, and few enough for 32-bit offsets.
    steps = min(-(-n // (blocks.splits * blocks.step)), ((1 << 31) - 1) // (d * blocks.step))
    rows = steps * blocks.step
    splits = -(-n // rows)
    shape = (r, d) if transposed else (d, r)
    # One split writes the result itself; several write float32 parts, summed in order below.
    out_dtype = dtype if splits == 1 else jnp.float32
    out_shapes = [jax.ShapeDtypeStruct((splits, clients, *shape), out_dtype)]
    if total:
        out_shapes.append(jax.ShapeDtypeStruct((splits, clients, d), jnp.float32))
    out = call.launcher(
        Launch(
            kernel=_outer_kernel(),
            grid=grid_of(clients, splits, -(-d // blocks.wide)),
            out_shapes=tuple(out_shapes),
            constants={
                "CLIENTS": clients,
                "N": n,
                "D": d,
                "R": r,
                "P_C": client_stride(wide),
                "Q_C": client_stride(skinny),
                "S_C": client_stride(o.scale),
                "R_C": 0 if o.ranks is None else client_stride(o.ranks),
                "O_D": 1 if transposed else r,
                "O_R": d if transposed else 1,
                "SCALED": scaled,
                "SUM": total,
                "RAGGED": o.ranks is not None,
                "UPCAST": call.upcast,
                "ROWS": rows,
                "BD": blocks.wide,
                "BT": blocks.step,
                "WIDE": rank_width(r),
                **({} if total else {"sum_ptr": None}),
            },
            blocks=blocks,
        ),
        wide,
        skinny,
        o.scale,
        skinny if o.ranks is None else o.ranks,
    )
    sums = [part[0] if splits == 1 else jnp.sum(part, axis=0) for part in out]
    return sums[0].astype(dtype), sums[1] if total else None


def _dense(x: jax.Array, w: jax.Array, axis: int, add: jax.Array | None = None) -> jax.Array:
    """x W for all clients (axis 0), or dy W^T (axis 1), plus `add`.

    With W shared it is one product of two matrices, and `add` joins it as a matrix too: the form
    in which XLA recognises an addend that the product's own epilogue can take.
    """
    if w.shape[0] == 1:
        clients, n, k = x.shape
        y = jax.lax.dot_general(x.reshape(clients * n, k), w[0], (((1,), (axis,)), ((), ())))
        if add is not None and add.shape[0] == clients:
            y = y + add.reshape(y.shape)
            add = None
        y = y.reshape(clients, n, y.shape[-1])
    else:
        if x.shape[0] == 1:
            x = jnp.broadcast_to(x, (w.shape[0], *x.shape[1:]))
        y = jax.lax.dot_general(x, w, (((2,), (axis + 1,)), ((0,), (0,))))
    return y if add is None else y + add


def _plan(call: _Call, o: Operands, x: jax.Array, f: int) -> str:
    if call.plan is not None:
        return call.plan
    shared_x = x.shape[0] != call.clients
    problem = _problem(call, o, x.shape[2], f)
    # The fused kernel has neither widths by rank nor offsets for a W of 2^31 elements.
    ragged = o.ranks is not None or math.prod(o.w.shape[1:]) >= 1 << 31
    return plan_for(problem, ragged=ragged, shared_x=shared_x, table=call.table)


def _product(
    call: _Call, o: Operands, x: jax.Array, mirrored: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y, u, z), or mirrored (dx, g, du), by whatever plan the shape takes."""
    first, second = (o.b, o.a) if mirrored else (o.a, o.b)
    f = o.w.shape[1] if mirrored else o.w.shape[2]
    plan = _plan(call, o, x, f)
    if plan == "fused":
        return _fused(call, o, x, mirrored)
    u, z = _down(call, o, x, first, mirrored)
    axis = 1 if mirrored else 0
    if plan == "inplace":
        base = _dense(x, o.w, axis)
        base = jnp.broadcast_to(base, (call.clients, *base.shape[1:]))
        return _up(call, o, z, second, mirrored, add=base), u, z
    y0 = _up(call, o, z, second, mirrored)
    return _dense(x, o.w, axis, add=y0), u, z


def _with_core(call: _Call, o: Operands) -> Operands:
    """Gather a large core once beforehand: as a tile of pointers it would fill shared memory."""
    r = o.a.shape[-1]
    if o.positions is None or rank_width(r) <= 64:
        return o
    flat = o.core.reshape(o.core.shape[0], -1)
    core = gather_launch(call.launcher, flat, o.positions)
    return o._replace(core=core.reshape(core.shape[0], r, r), positions=None)


def forward(
    o: Operands,
    *,
    launcher: Launcher,
    device: str,
    residual: bool,
    upcast: bool = False,
    plan: str | None = None,
    table: Table | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(y [C, n, F], u [C, n, r], z [C, n, r]). `plan` and `table` are for tests and tuning."""
    call = _Call(launcher, clients_of(o), device, upcast, residual, plan, table)
    o = _with_core(call, o)
    return _product(call, o, o.x, mirrored=False)


def backward(
    o: Operands,
    u: jax.Array,
    z: jax.Array,
    dy: jax.Array,
    *,
    launcher: Launcher,
    device: str,
    residual: bool,
    upcast: bool = False,
    plan: str | None = None,
    table: Table | None = None,
) -> Gradients:
    """Cotangents from dy [C, n, F]. There is no dW: W is frozen."""
    call = _Call(launcher, clients_of(o, u, z, dy), device, upcast, residual, plan, table)
    o = _with_core(call, o)
    dx, g, du = _product(call, o, dy, mirrored=True)
    da, _ = _outer(call, o, o.x, du, o.a.dtype, transposed=False)
    dcore, _ = _outer(call, o, u, g, o.core.dtype, transposed=False)
    db, dbias = _outer(
        call, o, dy, z, o.b.dtype, transposed=True, scaled=True, total=o.bias is not None
    )
    if o.bias is None or dbias is None:
        return Gradients(dx, da, dcore, db, None)
    return Gradients(dx, da, dcore, db, dbias.astype(o.bias.dtype))


def _kernels() -> Any:
    from h2tune_kernels import triton_triple

    return triton_triple


def _outer_kernel() -> Any:
    from h2tune_kernels.triton_outer import outer_kernel

    return outer_kernel

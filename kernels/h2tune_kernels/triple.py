"""The sparse triple-matrix product of one adapted site, differentiable and batched over clients.

    u = x A      z = u (I + T)      y = x W + bias + s z B        (residual; without: z = u T)

T is a core [r, r], or is gathered from a middle matrix [R, R] on the way into the product. The
backward, from the cotangent dy, with W frozen:

    dz = s dy B^T                     = g
    du = g (I + T)^T                  from z = u + u T
    dx = dy W^T + du A^T              x enters x W and x A
    dA = x^T du
    dT = u^T g                        and dM = dT put back at its positions
    dB = s z^T dy
    dbias = sum of dy over rows
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from h2tune_kernels import launch, triple_launch
from h2tune_kernels.core import put_core
from h2tune_kernels.dispatch import Kernels, Path, client_op, clients_of, resolve
from h2tune_kernels.triple_launch import Gradients, Operands

__all__ = [
    "MAX_RANK",
    "triple_matmul",
    "triple_matmul_ref",
    "triple_matmul_sparse",
    "triple_matmul_sparse_ref",
]

MAX_RANK = 128
"""Above it the core and its factors no longer fit a block."""


def triple_matmul_ref(
    x: jax.Array,  # [n, D]
    w: jax.Array,  # [D, F]
    a: jax.Array,  # [D, r]
    core: jax.Array,  # [r, r]
    b: jax.Array,  # [r, F]
    *,
    scale: float | jax.Array,
    bias: jax.Array | None = None,  # [F]
    residual: bool = True,
) -> jax.Array:
    """The definition, for one client, every step in the dtype of its operands."""
    u = x @ a
    z = u + u @ core if residual else u @ core
    y = x @ w + scale * (z @ b)
    return y if bias is None else y + bias[None, :]


def triple_matmul_sparse_ref(
    x: jax.Array,  # [n, D]
    w: jax.Array,  # [D, F]
    a: jax.Array,  # [D, r]
    middle: jax.Array,  # [R, R]
    index: jax.Array,  # i32[r*r]
    b: jax.Array,  # [r, F]
    *,
    scale: float | jax.Array,
    bias: jax.Array | None = None,  # [F]
    residual: bool = True,
) -> jax.Array:
    """The definition, for one client, with T gathered from a middle matrix."""
    r = math.isqrt(index.shape[0])
    core = middle.reshape(-1)[index].reshape(r, r)
    return triple_matmul_ref(x, w, a, core, b, scale=scale, bias=bias, residual=residual)


# The XLA path, for one client. Operands without their client axis: scale and ranks are scalars.


def _live(o: Operands) -> Operands:
    """Round to the dtype of x, gather the core, and zero what lies at or beyond the client's rank.

    Selected, not multiplied: what stands in the padding does not matter, NaN included.
    """
    r = o.a.shape[-1]
    core = o.core
    if o.positions is not None:
        core = (
            core.reshape(-1)
            .at[o.positions]
            .get(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)
        )
        core = core.reshape(r, r)
    a, core, b = (leaf.astype(o.x.dtype) for leaf in (o.a, core, o.b))
    if o.ranks is not None:
        live = jnp.arange(r, dtype=jnp.int32) < o.ranks
        zero = jnp.zeros((), o.x.dtype)
        a = jnp.where(live[None, :], a, zero)
        core = jnp.where(live[None, :] & live[:, None], core, zero)
        b = jnp.where(live[:, None], b, zero)
    return o._replace(a=a, core=core, b=b)


def _dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A small product, accumulated and returned in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))

    def native(left: jax.Array, right: jax.Array) -> jax.Array:
        return jax.lax.dot_general(left, right, dims, preferred_element_type=jnp.float32)

    def widened(left: jax.Array, right: jax.Array) -> jax.Array:
        return native(left.astype(jnp.float32), right.astype(jnp.float32))

    if left.dtype == jnp.float32:
        return native(left, right)
    # XLA's CPU back end refuses some 16-bit products with a float32 result when it runs them.
    return jax.lax.platform_dependent(left, right, cpu=widened, default=native)


def _adapter_xla(o: Operands, residual: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(s z B + bias, u, z): all but x W. Plain operations, so JAX can differentiate it as well."""
    dtype = o.x.dtype
    live = _live(o)
    u = _dot(o.x, live.a, (1, 0)).astype(dtype)
    z = _dot(u, live.core, (1, 0))
    if residual:
        z = z + u.astype(jnp.float32)
    z = z.astype(dtype)
    adapter = _dot(z, live.b, (1, 0)) * o.scale
    if o.bias is not None:
        adapter = adapter + o.bias.astype(jnp.float32)[None, :]
    return adapter.astype(dtype), u, z


def _forward_xla(o: Operands, residual: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    adapter, u, z = _adapter_xla(o, residual)
    return jax.lax.dot_general(o.x, o.w, (((1,), (0,)), ((), ()))) + adapter, u, z


def _backward_xla(
    o: Operands, u: jax.Array, z: jax.Array, dy: jax.Array, residual: bool
) -> Gradients:
    dtype = o.x.dtype
    live = _live(o)
    g = (_dot(dy, live.b, (1, 1)) * o.scale).astype(dtype)
    du = _dot(g, live.core, (1, 1))
    if residual:
        du = du + g.astype(jnp.float32)
    du = du.astype(dtype)
    dx = jax.lax.dot_general(dy, o.w, (((1,), (1,)), ((), ())))
    dx = dx + _dot(du, live.a, (1, 1)).astype(dtype)
    # Columns beyond the rank are zero in u, z, g and du, and so they are in the products below.
    da = _dot(o.x, du, (0, 0)).astype(o.a.dtype)
    dcore = _dot(u, g, (0, 0)).astype(o.core.dtype)
    db = (_dot(z, dy, (0, 0)) * o.scale).astype(o.b.dtype)
    dbias = None
    if o.bias is not None:
        dbias = jnp.sum(dy, axis=0, dtype=jnp.float32).astype(o.bias.dtype)
    return Gradients(dx, da, dcore, db, dbias)


def _over_clients(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Map a one-client function over operands [C or 1, ...], the shared ones unmapped."""

    def mapped(*args: Any) -> Any:
        clients = clients_of(*args)
        leaves, tree = jax.tree.flatten(args)
        shared = [leaf.shape[0] == 1 and clients > 1 for leaf in leaves]
        leaves = [leaf[0] if one else leaf for leaf, one in zip(leaves, shared, strict=True)]

        def flat(*leaves: jax.Array) -> Any:
            return fn(*jax.tree.unflatten(tree, leaves))

        return jax.vmap(flat, in_axes=[None if one else 0 for one in shared])(*leaves)

    return mapped


class _Setting(NamedTuple):
    """What is fixed at trace time."""

    path: Path
    residual: bool
    plan: str | None


@functools.cache
def _ops(setting: _Setting) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward) over a client axis."""
    path, residual, plan = setting

    def options(o: Operands) -> dict[str, Any]:
        launcher = launch.cuda_launcher
        if path == "interpreter":
            from h2tune_kernels.interpret import interpreter_launcher

            launcher = interpreter_launcher
        return {
            "launcher": launcher,
            "device": launch.target()[0],
            "residual": residual,
            "upcast": path == "interpreter" and o.x.dtype == jnp.bfloat16,
            "plan": plan,
        }

    def forward_triton(o: Operands) -> Any:
        return triple_launch.forward(o, **options(o))

    def backward_triton(o: Operands, u: jax.Array, z: jax.Array, dy: jax.Array) -> Any:
        return triple_launch.backward(o, u, z, dy, **options(o))

    return (
        client_op(
            path, forward_triton, _over_clients(functools.partial(_forward_xla, residual=residual))
        ),
        client_op(
            path,
            backward_triton,
            _over_clients(functools.partial(_backward_xla, residual=residual)),
        ),
    )


@functools.cache
def _product(setting: _Setting) -> Callable[[Operands], jax.Array]:
    """The differentiable product of one client, operands with a leading axis of 1."""
    forward, backward = _ops(setting)

    @jax.custom_vjp
    def product(o: Operands) -> jax.Array:
        return forward(o)[0]

    def fwd(o: Operands) -> tuple[jax.Array, Any]:
        y, u, z = forward(o)
        return y, (o, u, z)

    def bwd(residuals: Any, dy: jax.Array) -> tuple[Operands]:
        o, u, z = residuals
        d = backward(o, u, z, dy)
        dcore = d.core
        if o.positions is not None:
            size = o.core.shape[-1]
            flat = put_core(setting.path, size)(dcore.reshape(1, -1), o.positions)
            dcore = flat.reshape(1, size, size)
        # None is a zero cotangent that is never made: W is frozen, the rest is not differentiable.
        return (
            Operands(
                x=d.x, w=None, a=d.a, core=dcore, positions=None, b=d.b,  # pyright: ignore
                bias=d.bias, scale=None, ranks=None,  # pyright: ignore
            ),
        )  # fmt: skip

    product.defvjp(fwd, bwd)
    return product


def _one(value: jax.Array) -> jax.Array:
    """Add a client axis of one."""
    return value.reshape(1, *value.shape)


def _check(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, core: tuple[int, ...]) -> None:
    d, f = w.shape
    r = a.shape[-1]
    if x.shape[-1] != d or a.shape != (d, r) or b.shape != (r, f):
        raise ValueError(
            f"x {x.shape}, w {w.shape}, a {a.shape} and b {b.shape} do not go together: "
            "they are [..., D], [D, F], [D, r] and [r, F]"
        )
    if core != (r, r):
        raise ValueError(f"the core is {core} where a has rank {r}")
    if r > MAX_RANK:
        raise ValueError(f"ranks above {MAX_RANK} are not supported, and this one is {r}")
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}: both are in the compute dtype")


def _run(
    x: jax.Array,
    w: jax.Array,
    a: jax.Array,
    core: jax.Array,
    index: jax.Array | None,
    b: jax.Array,
    *,
    scale: float | jax.Array,
    bias: jax.Array | None,
    ranks: jax.Array | None,
    residual: bool,
    kernels: Kernels,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    plan: str | None,
) -> jax.Array:
    w = jax.lax.stop_gradient(w)
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
    if ranks is not None:
        # The kernels mask by rank alone: one beyond r would read into the next row of A.
        ranks = jnp.clip(jnp.asarray(ranks, jnp.int32), 0, a.shape[-1])
    if dropout_rate > 0.0:
        if kernels == "triton":
            raise ValueError(
                "adapter dropout is not fused: kernels='triton' cannot be had with "
                f"dropout_rate={dropout_rate}; use kernels='auto' or 'xla'"
            )
        if dropout_key is None:
            raise ValueError("dropout_rate above zero needs a dropout_key")
        # The adapter sees a thinned x and the base product does not.
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, x.shape)
        thinned = jnp.where(keep, x / jnp.asarray(1.0 - dropout_rate, x.dtype), jnp.zeros_like(x))
        rows = thinned.reshape(-1, x.shape[-1])
        o = Operands(rows, w, a, core, index, b, bias, scale, ranks)
        adapter, _, _ = _adapter_xla(o, residual)
        return jnp.dot(x, w) + adapter.reshape(*x.shape[:-1], w.shape[1])
    lead = x.shape[:-1]
    o = Operands(
        x=x.reshape(1, math.prod(lead), x.shape[-1]),
        w=_one(w),
        a=_one(a),
        core=_one(core),
        positions=None if index is None else _one(index),
        b=_one(b),
        bias=None if bias is None else _one(bias),
        scale=scale.reshape(1),
        ranks=None if ranks is None else ranks.reshape(1),
    )
    y = _product(_Setting(resolve(kernels), residual, plan))(o)
    return y.reshape(*lead, w.shape[1])


def triple_matmul(
    x: jax.Array,  # [..., D], compute dtype
    w: jax.Array,  # [D, F], compute dtype, frozen
    a: jax.Array,  # [D, r]
    core: jax.Array,  # [r, r]
    b: jax.Array,  # [r, F]
    *,
    scale: float | jax.Array,  # []
    bias: jax.Array | None = None,  # [F]
    ranks: jax.Array | None = None,  # i32[]
    residual: bool = True,
    kernels: Kernels = "auto",
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    plan: str | None = None,
) -> jax.Array:
    """y = x W + bias + scale ((x A) + (x A) T) B of one client, [..., F]; residual=False drops the I.

    Gradients go to x, a, core, b and bias. `w` is frozen, and `scale` is a constant: neither gets
    one, and no array of the size of `w` is made for it. a, core, b and bias may be kept in float32
    beside a 16-bit x: they are rounded to the dtype of x on the way in, sums run in float32, and
    their gradients come back in their own dtype.

    Write for one client and batch with `jax.vmap`: with `w` unmapped, any number of clients is one
    launch of each kernel, and W is read once. `ranks`, mapped over clients, is each client's own
    rank: columns at or beyond it are ignored whatever they hold, get zero gradients, and (in the
    kernels) cost next to nothing. A rank above r means r, and one below zero means zero.

    `kernels`: "auto" is Triton on CUDA and XLA elsewhere, decided when the program is lowered;
    "triton" is an error anywhere but on CUDA; "xla" is plain XLA. Dropout on the adapter's input is
    not fused and runs as XLA. `plan` overrides how the shape is cut up (see docs/kernels.md).
    """
    _check(x, w, a, b, core.shape)
    return _run(
        x, w, a, core, None, b, scale=scale, bias=bias, ranks=ranks, residual=residual,
        kernels=kernels, dropout_rate=dropout_rate, dropout_key=dropout_key, plan=plan,
    )  # fmt: skip


def triple_matmul_sparse(
    x: jax.Array,  # [..., D], compute dtype
    w: jax.Array,  # [D, F], compute dtype, frozen
    a: jax.Array,  # [D, r]
    middle: jax.Array,  # [R, R]
    index: jax.Array,  # i32[r*r]
    b: jax.Array,  # [r, F]
    *,
    scale: float | jax.Array,  # []
    bias: jax.Array | None = None,  # [F]
    ranks: jax.Array | None = None,  # i32[]
    residual: bool = True,
    kernels: Kernels = "auto",
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    plan: str | None = None,
) -> jax.Array:
    """`triple_matmul` with T = sparse_core(middle, index), gathered inside the kernel.

    The gradient to `middle` is dense [R, R], zero where nothing was selected. `index` rises strictly
    within [0, R*R), as in `sparse_core`; with `ranks`, it is laid out for the padded r.
    """
    r = math.isqrt(index.shape[-1])
    if r * r != index.shape[-1]:
        raise ValueError(f"index holds r*r positions; {index.shape[-1]} is no square")
    _check(x, w, a, b, (r, r))
    return _run(
        x, w, a, middle, index, b, scale=scale, bias=bias, ranks=ranks, residual=residual,
        kernels=kernels, dropout_rate=dropout_rate, dropout_key=dropout_key, plan=plan,
    )  # fmt: skip

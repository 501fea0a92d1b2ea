"""Taking a sparse core from a middle matrix, and putting one back: each the other's transpose.

    sparse_core     core[j] = middle[index[j]]
    scatter_core    middle[p] = core[j] where index[j] = p, zero elsewhere

Both only move numbers, so both are exact, and with strictly rising positions no two writers meet:
the same bits in every run, without atomics.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_kernels import launch
from h2tune_kernels.blocks import Blocks
from h2tune_kernels.dispatch import Kernels, Path, client_op, client_stride, clients_of, resolve
from h2tune_kernels.launch import Launch, Launcher, grid_of

__all__ = [
    "gather_launch",
    "put_core",
    "scatter_core",
    "scatter_core_ref",
    "scatter_launch",
    "sparse_core",
    "sparse_core_ref",
    "take_core",
]

_BLOCK = 1024
_BLOCKS = Blocks(rows=0, wide=_BLOCK, step=0, num_warps=4, num_stages=1)


def sparse_core_ref(middle: jax.Array, index: jax.Array) -> jax.Array:
    """One client, no batch axes: middle [R, R], index i32[r*r] -> [r, r]."""
    r = math.isqrt(index.shape[0])
    return middle.reshape(-1)[index].reshape(r, r)


def scatter_core_ref(core: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """One client, no batch axes: core [r, r], index i32[r*r] -> [size, size]."""
    flat = jnp.zeros((size * size,), core.dtype)
    return flat.at[index].set(core.reshape(-1)).reshape(size, size)


def _take_xla(middle: jax.Array, index: jax.Array) -> jax.Array:
    """middle [size*size], index [r*r] -> [r*r]."""
    return middle.at[index].get(
        mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
    )


def _put_xla(core: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """core [r*r], index [r*r] -> [size*size]."""
    return (
        jnp.zeros((size * size,), core.dtype)
        .at[index]
        .set(core, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)
    )


def gather_launch(launcher: Launcher, middle: jax.Array, index: jax.Array) -> jax.Array:
    """middle [C, size*size], index [C, r*r] -> [C, r*r]."""
    from h2tune_kernels import triton_core

    clients, count = clients_of(middle, index), index.shape[1]
    (core,) = launcher(
        Launch(
            kernel=triton_core.gather_kernel,
            grid=grid_of(clients, -(-count // _BLOCK)),
            out_shapes=(jax.ShapeDtypeStruct((clients, count), middle.dtype),),
            constants={
                "COUNT": count,
                "M_C": client_stride(middle),
                "I_C": client_stride(index),
                "BLOCK": _BLOCK,
            },
            blocks=_BLOCKS,
        ),
        middle,
        index,
    )
    return core


def scatter_launch(launcher: Launcher, core: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """core [C, r*r], index [C, r*r] -> [C, size*size]."""
    from h2tune_kernels import triton_core

    clients, count = clients_of(core, index), index.shape[1]
    (middle,) = launcher(
        Launch(
            kernel=triton_core.scatter_kernel,
            grid=grid_of(clients, -(-size * size // _BLOCK)),
            out_shapes=(jax.ShapeDtypeStruct((clients, size * size), core.dtype),),
            constants={
                "COUNT": count,
                "SIZE": size * size,
                "STEPS": count.bit_length(),
                "G_C": client_stride(core),
                "I_C": client_stride(index),
                "BLOCK": _BLOCK,
            },
            blocks=_BLOCKS,
        ),
        core,
        index,
    )
    return middle


def _launcher(path: Path) -> Launcher:
    if path == "interpreter":
        from h2tune_kernels.interpret import interpreter_launcher

        return interpreter_launcher
    return launch.cuda_launcher


@functools.cache
def take_core(path: Path) -> Callable[..., Any]:
    """The gather over a client axis: (middle [C, size*size], index [C, r*r]) -> [C, r*r]."""

    def triton_fn(middle: jax.Array, index: jax.Array) -> jax.Array:
        return gather_launch(_launcher(path), middle, index)

    def xla_fn(middle: jax.Array, index: jax.Array) -> jax.Array:
        clients = clients_of(middle, index)
        spread = [jnp.broadcast_to(v, (clients, v.shape[1])) for v in (middle, index)]
        return jax.vmap(_take_xla)(*spread)

    return client_op(path, triton_fn, xla_fn)


@functools.cache
def put_core(path: Path, size: int) -> Callable[..., Any]:
    """The scatter over a client axis: (core [C, r*r], index [C, r*r]) -> [C, size*size]."""

    def triton_fn(core: jax.Array, index: jax.Array) -> jax.Array:
        return scatter_launch(_launcher(path), core, index, size)

    def xla_fn(core: jax.Array, index: jax.Array) -> jax.Array:
        clients = clients_of(core, index)
        spread = [jnp.broadcast_to(v, (clients, v.shape[1])) for v in (core, index)]
        return jax.vmap(lambda core, index: _put_xla(core, index, size))(*spread)

    return client_op(path, triton_fn, xla_fn)


@functools.cache
def _taking(path: Path, size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    @jax.custom_vjp
    def take(middle: jax.Array, index: jax.Array) -> jax.Array:
        return take_core(path)(middle, index)

    def fwd(middle: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, int]]:
        return take(middle, index), (index, middle.shape[0])

    def bwd(residuals: tuple[jax.Array, int], ct: jax.Array) -> tuple[jax.Array, None]:
        index, leading = residuals
        out = put_core(path, size)(ct, index)
        return (jnp.sum(out, axis=0, keepdims=True) if leading == 1 else out), None

    take.defvjp(fwd, bwd)
    return take


@functools.cache
def _putting(path: Path, size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    @jax.custom_vjp
    def put(core: jax.Array, index: jax.Array) -> jax.Array:
        return put_core(path, size)(core, index)

    def fwd(core: jax.Array, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, int]]:
        return put(core, index), (index, core.shape[0])

    def bwd(residuals: tuple[jax.Array, int], ct: jax.Array) -> tuple[jax.Array, None]:
        index, leading = residuals
        out = take_core(path)(ct, index)
        return (jnp.sum(out, axis=0, keepdims=True) if leading == 1 else out), None

    put.defvjp(fwd, bwd)
    return put


def _lead(array: jax.Array, axes: int, leading: tuple[int, ...]) -> jax.Array:
    """Flatten all but the last `axes` axes to one, of length 1 where the operand has none."""
    tail = array.shape[array.ndim - axes :]
    flat = (math.prod(tail),)
    if array.ndim == axes:
        return array.reshape(1, *flat)
    return jnp.broadcast_to(array, (*leading, *tail)).reshape(-1, *flat)


def _side(index: jax.Array) -> int:
    count = index.shape[-1]
    r = math.isqrt(count)
    if r * r != count:
        raise ValueError(f"index holds the r*r positions of a core; {count} is no square")
    return r


def sparse_core(
    middle: jax.Array,  # [..., R, R]
    index: jax.Array,  # i32[..., r*r]
    *,
    kernels: Kernels = "auto",
) -> jax.Array:
    """The core [..., r, r] at flat, strictly rising positions of a middle matrix.

    Leading axes, and vmap, are batches; an operand without them is shared. Exact and deterministic,
    with gradient to `middle`. The positions must rise strictly and lie in [0, R*R): that is promised
    to the compiler and not checked.
    """
    r, size = _side(index), middle.shape[-1]
    leading = np.broadcast_shapes(middle.shape[:-2], index.shape[:-1])
    take = _taking(resolve(kernels), size)
    core = take(_lead(middle, 2, leading), _lead(index, 1, leading))
    return core.reshape(*leading, r, r)


def scatter_core(
    core: jax.Array,  # [..., r, r]
    index: jax.Array,  # i32[..., r*r]
    size: int,  # R
    *,
    kernels: Kernels = "auto",
) -> jax.Array:
    """The matrix [..., R, R] with a core at flat, strictly rising positions and zero elsewhere.

    The transpose of `sparse_core`, under the same promises.
    """
    if _side(index) != core.shape[-1]:
        raise ValueError(f"a core {core.shape} does not go with an index {index.shape}")
    leading = np.broadcast_shapes(core.shape[:-2], index.shape[:-1])
    put = _putting(resolve(kernels), size)
    middle = put(_lead(core, 2, leading), _lead(index, 1, leading))
    return middle.reshape(*leading, size, size)

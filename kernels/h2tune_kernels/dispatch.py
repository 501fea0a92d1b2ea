"""Which path an op takes, and how it meets a client axis."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir

from h2tune_kernels import launch

__all__ = ["Kernels", "Path", "client_op", "client_stride", "clients_of", "resolve"]

Kernels = Literal["auto", "triton", "xla"]
# What `kernels` comes to in this process: plain XLA; Triton on CUDA and XLA elsewhere; Triton or an
# error; Triton's interpreter.
Path = Literal["xla", "auto", "triton", "interpreter"]


def resolve(kernels: Kernels) -> Path:
    """What the switch means here. An explicit "triton" that cannot be met is an error."""
    if kernels == "xla":
        return "xla"
    if kernels == "auto":
        return "auto" if launch.available() and not launch.interpreted() else "xla"
    if kernels == "triton":
        if launch.interpreted():
            return "interpreter"
        if not launch.available():
            raise RuntimeError(
                "kernels='triton' was asked for, but jax_triton cannot be imported here: it needs "
                "the packages jax-triton and triton and a CUDA plugin of JAX (the extras cuda12 and "
                "cuda13 install them). Use kernels='auto' or 'xla' on machines without a GPU."
            )
        return "triton"
    raise ValueError(f"kernels is 'auto', 'triton' or 'xla', not {kernels!r}")


# Stands where an explicit "triton" meets a platform without it. It traces, so that one trace can
# still be lowered for CUDA from a machine without a GPU; lowering it for anything else raises.
_refuse_p = Primitive("h2tune_triton_refused")
_refuse_p.multiple_results = True
_refuse_p.def_abstract_eval(lambda *_, avals: list(avals))


def _refuse_lowering(ctx: Any, *_: Any, avals: Any) -> Any:
    platforms = ", ".join(ctx.module_context.platforms)
    raise NotImplementedError(
        f"kernels='triton' runs on CUDA only, and this program is being built for {platforms}. "
        "Use kernels='auto' (Triton on CUDA, XLA elsewhere) or kernels='xla'."
    )


mlir.register_lowering(_refuse_p, _refuse_lowering)


def _refuse(fn: Callable[..., Any], *args: Any) -> Any:
    out, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    results = _refuse_p.bind(*jax.tree.leaves(args), avals=tuple(out.out_avals))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def clients_of(*args: Any) -> int:
    """The number of clients of operands whose leading axis is that number, or 1 where shared."""
    return max(leaf.shape[0] for leaf in jax.tree.leaves(args))


def client_stride(array: jax.Array) -> int:
    """Elements from one client to the next; 0 for a shared operand."""
    return 0 if array.shape[0] == 1 else math.prod(array.shape[1:])


def _merge(leaf: jax.Array, batched: bool, size: int, clients: int) -> jax.Array:
    """Fold a new leading axis of `size` into the client axis, sharing what can stay shared."""
    if not batched:
        if leaf.shape[0] == 1:
            return leaf
        # Mapped by an inner vmap and shared by an outer one: one stride cannot say that.
        leaf = jnp.broadcast_to(leaf[None], (size, *leaf.shape))
    elif leaf.shape[1] != clients:
        leaf = jnp.broadcast_to(leaf, (size, clients, *leaf.shape[2:]))
    return leaf.reshape(size * clients, *leaf.shape[2:])


def client_op(
    path: Path, triton_fn: Callable[..., Any], xla_fn: Callable[..., Any]
) -> Callable[..., Any]:
    """An op over operands with a client axis in front, which `jax.vmap` extends in place.

    Both functions take pytrees of arrays [C or 1, ...] (1: shared by all clients) and return
    pytrees of arrays [C, ...]. However many vmaps surround it, the op runs once, over their product.
    """

    def run(*args: Any) -> Any:
        if path == "xla":
            return xla_fn(*args)
        if path == "interpreter":
            return triton_fn(*args)
        if path == "triton":
            refuse = functools.partial(_refuse, xla_fn)
            return jax.lax.platform_dependent(*args, cuda=triton_fn, default=refuse)
        return jax.lax.platform_dependent(*args, cuda=triton_fn, default=xla_fn)

    @custom_vmap
    def op(*args: Any) -> Any:
        return run(*args)

    @op.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(list(args))
        flags = jax.tree.leaves(list(in_batched))
        clients = max(leaf.shape[int(flag)] for leaf, flag in zip(leaves, flags, strict=True))
        merged = [
            _merge(leaf, flag, axis_size, clients) for leaf, flag in zip(leaves, flags, strict=True)
        ]
        out = op(*jax.tree.unflatten(tree, merged))
        split = jax.tree.map(lambda y: y.reshape(axis_size, clients, *y.shape[1:]), out)
        return split, jax.tree.map(lambda _: True, split)

    return op

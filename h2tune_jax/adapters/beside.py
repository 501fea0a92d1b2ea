"""A frozen delta beside a frozen weight: what a server has folded in, dense and in low-rank columns.

y = x W + x dense + (x U) V
"""

import dataclasses

import jax
import jax.numpy as jnp

from h2tune_jax.precision import exact
from h2tune_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """What stands beside the frozen weights of one kind of site. Nothing of it is trained.

    With a `part` only some of it does: so each client can stand beside what it had, while all share the
    arrays that are large.
    """

    dense: Array  # T[Li, D, F]
    u: Array | None = None  # T[Li, D, Q]; None: no columns
    v: Array | None = None  # T[Li, Q, F]
    part: Array | None = None  # bool[Li, Q + 1], which columns count and, last, if `dense` does


@exact
def total(beside: Beside) -> Array:  # T[Li, D, F]
    """Return the whole delta."""
    dense, part = beside.dense, beside.part
    if part is not None:
        dense = jnp.where(part[..., -1:, None], dense, 0)
    if beside.u is None or beside.v is None:
        return dense
    u = beside.u if part is None else jnp.where(part[..., None, :-1], beside.u, 0)
    return dense + u @ beside.v


def add(x: Array, w: Array, beside: Beside) -> Array:
    """Compute x W + x dense + (x U) V for one layer, in the dtype of x."""
    part = beside.part
    if part is None and jnp.finfo(w.dtype).bits >= 32:
        y = x @ (w + beside.dense.astype(w.dtype))
    else:
        # In 16 bits a small delta would be lost in the sum with the weight; and summed for each client's
        # part of the delta there would be as many weights as clients.
        apart = x @ beside.dense.astype(x.dtype)
        y = x @ w + _masked(apart, None if part is None else part[-1:])
    if beside.u is not None and beside.v is not None:
        inner = x @ beside.u.astype(x.dtype)
        y = y + _masked(inner, None if part is None else part[:-1]) @ beside.v.astype(x.dtype)
    return y


def _masked(x: Array, mask: Array | None) -> Array:
    """Zero what is not in the mask bool[n], n the last width of x or 1."""
    return x if mask is None else jnp.where(mask.reshape((1,) * (x.ndim - 1) + (-1,)), x, 0)

"""A frozen delta beside a frozen weight: what a server has folded in, dense and in low-rank columns.

y = x W + x dense + (x U) V
"""

import dataclasses

import jax
import jax.numpy as jnp

from h2tune_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Beside:
    """What stands beside the frozen weights of one kind of site. Nothing of it is trained."""

    dense: Array  # T[Li, D, F]
    u: Array  # T[Li, D, Q]
    v: Array  # T[Li, Q, F]


def total(beside: Beside) -> Array:  # T[Li, D, F]
    """Return the whole delta."""
    return beside.dense + beside.u @ beside.v


def add(x: Array, w: Array, beside: Beside) -> Array:
    """Compute x W + x dense + (x U) V for one layer, in the dtype of x."""
    low_rank = (x @ beside.u.astype(x.dtype)) @ beside.v.astype(x.dtype)
    if jnp.finfo(w.dtype).bits < 32:
        # In 16 bits a small delta would be lost in the sum with the weight.
        return x @ w + x @ beside.dense.astype(x.dtype) + low_rank
    return x @ (w + beside.dense.astype(w.dtype)) + low_rank

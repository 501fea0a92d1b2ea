"""DeMA, a dense mixture of adapters beside a block (HeteroTune, arXiv 2411.16796; our reading).

Down-projection d -> m, the sum of all branches that the client holds, up-projection m -> d. A branch maps
m -> m through its own width and a GELU. Nothing is routed, so branches that stand side by side are one
wider two-layer map: their first matrices are kept as columns of `inner`, their second as rows of `outer`,
and a client that holds the first n of them holds the first columns and rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from h2tune_jax.adapters import triple
from h2tune_jax.adapters.dropout import drop
from h2tune_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dema:
    """A block adapter: (gelu(x down inner) outer) up. Stacked over layers the arrays lead with [Li]."""

    down: Array  # T[Li, d, m]
    inner: Array  # T[Li, m, W], W the widths of the held branches together
    outer: Array  # T[Li, W, m]
    up: Array  # T[Li, m, d]
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Compute what one layer's adapter adds, in the dtype of x."""
        x = drop(x, self.dropout, key)
        hidden = x @ self.down.astype(x.dtype) @ self.inner.astype(x.dtype)
        hidden = jax.nn.gelu(hidden, approximate=False)
        return hidden @ self.outer.astype(x.dtype) @ self.up.astype(x.dtype)


def init_branches(
    key: Array, slots: int, size: int, widths: tuple[int, ...], dtype
) -> tuple[Array, Array]:  # [L, m, W], [L, W, m]
    """Draw all branches of every slot, each as it would be drawn alone."""
    inner, outer = [], []
    for branch, width in enumerate(widths):
        in_key, out_key = jax.random.split(jax.random.fold_in(key, branch))
        inner.append(triple.uniform(in_key, (slots, size, width), size, dtype))
        outer.append(triple.uniform(out_key, (slots, width, size), width, dtype))
    return jnp.concatenate(inner, axis=2), jnp.concatenate(outer, axis=1)


def init_projections(
    key: Array, num_layers: int, width: int, size: int, dtype
) -> tuple[Array, Array]:  # [Li, d, m], [Li, m, d]
    """Draw a client's own projections; the second starts at zero, and so does the adapter."""
    down = triple.uniform(key, (num_layers, width, size), width, dtype)
    return down, jnp.zeros((num_layers, size, width), dtype)

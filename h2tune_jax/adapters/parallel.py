"""A low-rank pair of the client's own, and beside it a core in a frozen basis that clients share.

y = x W + scale * (x A) B + ((x U) T) V

T stands in coordinates that mean the same at every client with the same U and V, so a mean of T's is the
mean of what they do; A and B stay what they are, a client's own. Without A and B, and between singular
vectors, this is close to LoRA-XS (arXiv 2405.17604), which has the singular values in U as well.
"""

import dataclasses

import jax
import jax.numpy as jnp

from h2tune_jax.adapters import triple
from h2tune_jax.adapters.dropout import drop
from h2tune_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSite:
    """Both products of one kind of site. Stacked over layers the arrays lead with [Li]."""

    a: Array  # T[Li, D, r]
    b: Array  # T[Li, r, F]
    u: Array  # T[Li, D, R]
    core: Array  # T[Li, R, R]
    v: Array  # T[Li, R, F]
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def update(self, x: Array, key: Array | None = None) -> Array:
        """Compute what one layer's site adds, in the dtype of x."""
        x = drop(x, self.dropout, key)
        own = triple.update(x, self.a, None, self.b, scale=self.scale)
        return own + triple.update(x, self.u, self.core, self.v, scale=1.0, residual=False)

    def fold(self) -> tuple[Array, Array]:
        """Return an ordinary LoRA pair of rank r + R with the same product, under the same scale."""
        u, v = triple.fold(self.u, self.core, self.v, residual=False)
        a = jnp.concatenate([self.a, u], axis=-1)
        return a, jnp.concatenate([self.b, v / self.scale], axis=-2)

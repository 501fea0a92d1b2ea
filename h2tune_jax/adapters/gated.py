"""Two low-rank branches beside a frozen weight, mixed token by token (Co-LoRA's form of a site).

A branch computes ((x A) P + Q) B. With P the identity and Q zero it is a plain LoRA.
"""

import dataclasses

import jax

from h2tune_jax.adapters.dropout import drop
from h2tune_jax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Branch:
    """One branch. Stacked over layers the arrays lead with [Li]."""

    a: Array  # T[Li, D, r]
    p: Array  # T[Li, r, r]
    q: Array  # T[Li, r]
    b: Array  # T[Li, r, F]

    def __call__(self, x: Array) -> Array:
        """Compute ((x A) P + Q) B for one layer, in the dtype of x."""
        a, p, q, b = (leaf.astype(x.dtype) for leaf in (self.a, self.p, self.q, self.b))
        return ((x @ a) @ p + q.reshape((1,) * (x.ndim - 1) + (-1,))) @ b


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedSite:
    """A site that adds scale * ((1 - g) local(x) + g shared(x)), g = sigmoid((x A_local) v + v_0)."""

    local: Branch
    shared: Branch
    gate: Array  # T[Li, r + 1]; v and, last, v_0. All zero: half of each
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def update(self, x: Array, key: Array | None = None) -> Array:
        """Compute what one layer's site adds, in the dtype of x."""
        x = drop(x, self.dropout, key)
        gate = self.gate.astype(x.dtype)
        share = jax.nn.sigmoid(x @ self.local.a.astype(x.dtype) @ gate[:-1] + gate[-1])[..., None]
        return self.scale * ((1 - share) * self.local(x) + share * self.shared(x))

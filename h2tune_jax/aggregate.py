"""Server maths: sums and means over clients, with masks for what a client does not have."""

import jax
import jax.numpy as jnp

from h2tune_jax.types import Array, PyTree, at_least_float32


def weighted_part(tree: PyTree, weight: Array, mask: PyTree | None = None) -> tuple[PyTree, PyTree]:
    """One client's summand of a weighted mean: (weight * mask * value, weight * mask).

    Without a mask the client counts everywhere. A mask has the structure of `tree`, and leaves that
    broadcast to its leaves. The parts are float32 or wider, whatever the dtype of the values.
    """
    if mask is None:
        mask = jax.tree.map(lambda leaf: jnp.ones((1,) * leaf.ndim, bool), tree)

    def weigh(leaf, mask):
        dtype = at_least_float32(leaf.dtype)
        share = weight.astype(dtype) * mask.astype(dtype)
        # where, not a product: what is masked out may be anything, infinities included.
        return jnp.where(share != 0, leaf.astype(dtype) * share, 0), share

    parts = jax.tree.map(weigh, tree, mask)
    return jax.tree.transpose(jax.tree.structure(tree), jax.tree.structure((0, 0)), parts)


def mean_or_keep(total: PyTree, share: PyTree, previous: PyTree) -> PyTree:
    """Divide summed parts; entries for which nobody counts keep their previous value."""

    def divide(total, share, previous):
        mean = total / jnp.where(share > 0, share, 1)
        return jnp.where(share > 0, mean.astype(previous.dtype), previous)

    return jax.tree.map(divide, total, share, previous)

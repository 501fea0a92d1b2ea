"""Server maths: sums and means over clients, with masks for what a client does not have."""

import jax
import jax.numpy as jnp

from h2tune_jax.types import Array, PyTree


def weighted_part(tree: PyTree, weight: Array, mask: PyTree | None = None) -> tuple[PyTree, PyTree]:
    """One client's summand of a weighted mean: (weight * mask * value, weight * mask).

    Without a mask the client counts everywhere. A mask has the structure of `tree`, and leaves that
    broadcast to its leaves.
    """
    if mask is None:
        mask = jax.tree.map(lambda leaf: jnp.ones((1,) * leaf.ndim, bool), tree)
    share = jax.tree.map(
        lambda leaf, m: weight.astype(leaf.dtype) * m.astype(leaf.dtype), tree, mask
    )
    # where, not a product: what is masked out may be anything, infinities included.
    value = jax.tree.map(
        lambda leaf, s: jnp.where(s != 0, leaf * s, jnp.zeros_like(leaf)), tree, share
    )
    return value, share


def mean_or_keep(total: PyTree, share: PyTree, previous: PyTree) -> PyTree:
    """Divide summed parts; entries for which nobody counts keep their previous value."""

    def divide(total, share, previous):
        return jnp.where(share > 0, total / jnp.where(share > 0, share, 1), previous)

    return jax.tree.map(divide, total, share, previous)


def masked_mean(
    uploads: PyTree,  # leaves [S, ...]
    weights: Array,  # f32[S]
    previous: PyTree,  # leaves [...]
    masks: PyTree | None = None,  # leaves [S, ...] that broadcast to the uploads'
) -> PyTree:
    """Average stacked uploads over the clients that count for each entry; else keep `previous`."""
    if masks is None:
        masks = jax.tree.map(
            lambda leaf: jnp.ones((leaf.shape[0],) + (1,) * (leaf.ndim - 1), bool), uploads
        )
    parts = jax.vmap(weighted_part)(uploads, weights, masks)
    total, share = jax.tree.map(lambda leaf: leaf.sum(axis=0), parts)
    return mean_or_keep(total, share, previous)

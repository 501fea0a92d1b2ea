"""CMGA, the cross-model gradient alignment of HeteroTune's server (our reading), and what it averages.

Of each branch of each slot: u is the mean of its holders' updates; an update with <delta_i, u> < 0 loses
its component along u; the mean of what is left is rescaled to the mean norm of the updates as they came.
As every component is taken along the one u, the mean keeps u's direction: read so, the alignment and its
rescaling settle how far the server goes, and a mean of updates that nearly cancel becomes a long step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.precision import exact
from h2tune_jax.types import Array, at_least_float32


class Branches(NamedTuple):
    """Branches of every slot side by side; a client's have its own slots U and its own width Wi."""

    inner: Array  # T[L, m, W]
    outer: Array  # T[L, W, m]


class Part(NamedTuple):
    """What a cohort's participants send, and which part of the server's branches it is."""

    slots: np.ndarray  # i64[U]
    width: int  # Wi, of the branches they hold
    updates: Branches  # T[S, U, m, Wi], T[S, U, Wi, m]
    weights: Array  # f32[S]


@exact
def mean_update(
    server: Branches,
    parts: list[Part],
    ends: np.ndarray,  # i64[B], where each branch's columns end
    *,
    aligned: bool,
) -> tuple[Branches, Array]:
    """Average updates over the holders of each branch of each slot, by CMGA where `aligned`.

    Returns the server's step and the share of updates (by weight) that went against the mean.
    """
    dtype = at_least_float32(server.inner.dtype)
    width = server.inner.shape[2]
    # Columns of `inner` (rows of `outer`) belong to branches: [W, B].
    member = jnp.asarray(
        np.searchsorted(ends, np.arange(width), side="right")[:, None] == np.arange(len(ends)),
        dtype,
    )

    def by_branch(one: Branches, other: Branches) -> Array:  # [..., L, m, W] -> [..., L, B]
        columns = (one.inner * other.inner).sum(axis=-2) + (one.outer * other.outer).sum(axis=-1)
        return columns @ member[: columns.shape[-1]]

    def spread(values: Array) -> Branches:  # [L, B] -> over the branches' entries
        columns = values @ member.T
        return Branches(columns[:, None, :], columns[:, :, None])

    def cut(tree: Branches, slots: np.ndarray, wide: int) -> Branches:
        return Branches(tree.inner[slots, :, :wide], tree.outer[slots, :wide])

    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), server)
    share = jnp.zeros((server.inner.shape[0], len(ends)), dtype)
    for slots, wide, updates, weight in parts:
        weigh = lambda leaf, w=weight: jnp.tensordot(w.astype(dtype), leaf.astype(dtype), axes=1)
        own = jax.tree.map(weigh, updates)
        total = Branches(
            total.inner.at[slots, :, :wide].add(own.inner),
            total.outer.at[slots, :wide].add(own.outer),
        )
        holds = jnp.asarray(np.arange(len(ends)) < np.searchsorted(ends, wide) + 1)
        share = share.at[slots].add(weight.astype(dtype).sum() * holds.astype(dtype)[None, :])
    count = jnp.where(share > 0, share, 1)
    mean = jax.tree.map(jnp.divide, total, spread(count))
    length = by_branch(mean, mean)

    norms, removed, against = jnp.zeros_like(share), jnp.zeros_like(share), jnp.zeros_like(share)
    for slots, wide, updates, weight in parts:
        updates = jax.tree.map(lambda leaf: leaf.astype(dtype), updates)
        common = jax.tree.map(lambda leaf: leaf[None], cut(mean, slots, wide))
        along = by_branch(updates, common)  # <delta_i, u>
        backwards = jnp.minimum(along, 0) / jnp.where(length > 0, length, 1)[slots][None]
        weigh = lambda values, w=weight: jnp.tensordot(w.astype(dtype), values, axes=1)
        norms = norms.at[slots].add(weigh(jnp.sqrt(by_branch(updates, updates))))
        removed = removed.at[slots].add(weigh(backwards))
        against = against.at[slots].add(weigh((along < 0).astype(dtype)))
    everyone = share.sum()
    conflicts = against.sum() / jnp.where(everyone > 0, everyone, 1)
    if not aligned:
        return mean, conflicts

    # The mean of delta_i - (its component along u, if negative): u less the mean component.
    mean = jax.tree.map(lambda leaf, c: leaf * (1 - c), mean, spread(removed / count))
    length = jnp.sqrt(by_branch(mean, mean))
    factor = jnp.where(length > 0, norms / count / jnp.where(length > 0, length, 1), 0)
    return jax.tree.map(jnp.multiply, mean, spread(factor)), conflicts

"""What a server last heard of every client, for methods that send each client a mean of its own."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.aggregate import note_latest
from h2tune_jax.types import Array, PyTree


class Latest(NamedTuple):
    """What each client of a cohort has last sent."""

    sent: PyTree  # leaves [C, ...]
    weights: Array  # f32[C], how much a client counts; 0 until it is heard


def nobody_yet(num_clients: int, first: PyTree) -> Latest:
    """Stand `first` for what each client has sent, though nobody has."""
    rows = lambda leaf: jnp.repeat(leaf[None], num_clients, axis=0)
    return Latest(jax.tree.map(rows, first), jnp.zeros(num_clients, jnp.float32))


def note_round(
    latest: tuple[Latest, ...],
    uploads: tuple,
    weights: tuple[Array, ...],
    client_ids: tuple[Array, ...],
) -> tuple[Latest, ...]:
    """Note what those who count in a round have sent, and how much they count; a cohort each."""
    return tuple(
        old if sent is None else note_latest(old, Latest(sent, weight), ids, weight)
        for old, sent, weight, ids in zip(latest, uploads, weights, client_ids)
    )


def for_each(client_ids: Array, mean_fn: Callable[[Array], PyTree]) -> PyTree:  # leaves [S, ...]
    """Take every participant's own mean.

    One after the other: what a client is sent has the same bits whoever else takes part.
    """
    return jax.lax.map(mean_fn, client_ids)

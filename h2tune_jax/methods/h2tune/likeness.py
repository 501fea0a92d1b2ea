"""How alike two clients' data are, told across models that begin with the same layer.

A client describes some of its examples by their cosines with the same public texts, in its own model's
first layer, both centred on the public texts: a relative representation (Moschella et al., ICLR 2023,
arXiv 2209.15430). Its signature is their mean and the variance of that mean: as many numbers as there are
public texts, and one. Between two clients with the same kind of data the means differ by no more than
chance. It is a statistic of the data: a server learns what they are about.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.training import room
from h2tune_jax.types import Array, ClientData, CohortSpec, PyTree

NOTHING_KNOWN = 1e6


class Signature(NamedTuple):
    """What a client says of its data. Of n public texts, which all clients know."""

    mean: Array  # f32[n]
    variance: Array  # f32[], of the mean, over what else the client might have drawn


def empty(num_texts: int) -> Signature:
    """Return the shape of a signature, of nobody."""
    return Signature(jnp.zeros(num_texts, jnp.float32), jnp.zeros((), jnp.float32))


def signature(
    spec: CohortSpec, base: PyTree, data: ClientData, probe: Array, num_examples: int
) -> Signature:
    """Describe so many of a client's examples, evenly spaced; `probe` f32[n, d] is the layer on the
    public texts.

    Of a client with fewer than two examples nothing is known: it is as near to all.
    """
    count = min(num_examples, room(data))
    order = jnp.arange(count, dtype=jnp.int32)
    # Where there are fewer, each of them once: a row named twice would look like certainty.
    spaced = jnp.where(data.num_examples > count, order * data.num_examples // count, order)
    examples = jax.tree.map(lambda leaf: leaf[spaced], data.examples)
    rows = spec.model.first_layer(base, examples).astype(jnp.float32)
    centre = probe.mean(axis=0, keepdims=True)
    relative = _unit(rows - centre) @ _unit(probe - centre).T
    held = (order < data.num_examples)[:, None]
    known = held.sum().astype(jnp.float32)
    mean = jnp.where(held, relative, 0).sum(axis=0) / jnp.maximum(known, 1)
    squares = jnp.where(held, jnp.square(relative - mean[None]), 0).sum()
    variance = squares / jnp.maximum(known * (known - 1), 1)
    return Signature(mean, jnp.where(known > 1, variance, NOTHING_KNOWN))


def distance(one: Signature, others: Signature) -> Array:  # f32[C]
    """Square of the distance from other clients' means, over what chance alone would give.

    About 1 between clients whose data are of one kind.
    """
    apart = jnp.square(others.mean - one.mean[None]).sum(axis=1)
    chance = one.variance + others.variance
    return apart / jnp.where(chance > 0, chance, 1)


def _unit(rows: Array) -> Array:
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1)

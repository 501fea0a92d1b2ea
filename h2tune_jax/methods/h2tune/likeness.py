"""How alike two clients' data are, told across architectures without showing any of it.

A client describes each of some of its examples by the cosines with the same public texts, in its own
model's first layer, both centred on the public texts: a relative representation (Moschella et al., ICLR
2023, arXiv 2209.15430). Its signature is their mean and the spread of that mean: as many numbers as there
are public texts, and one. Two clients with the same kind of data differ by no more than chance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.types import Array, ClientData, CohortSpec, PyTree


class Signature(NamedTuple):
    """What a client says of its data. Of n public texts, which all clients know."""

    mean: Array  # f32[n]
    spread: (
        Array  # f32[], the expected square of the mean's distance from what more data would give
    )


def empty(num_texts: int) -> Signature:
    """Return the shape of a signature, of nobody."""
    return Signature(jnp.zeros(num_texts, jnp.float32), jnp.zeros((), jnp.float32))


def signature(
    spec: CohortSpec, base: PyTree, data: ClientData, texts: Array, num_examples: int
) -> Signature:
    """Describe a client's first `num_examples` examples; `texts` [n, d] is the layer on the probe."""
    fn = spec.model.layer_outputs_fn
    assert fn is not None  # refused by `check`
    examples = jax.tree.map(lambda leaf: leaf[:num_examples], data.examples)
    rows = fn(base, examples)[0].astype(jnp.float32)
    centre = texts.mean(axis=0, keepdims=True)
    relative = _unit(rows - centre) @ _unit(texts - centre).T
    held = (jnp.arange(rows.shape[0], dtype=jnp.int32) < data.num_examples)[:, None]
    count = held.sum().astype(jnp.float32)
    mean = jnp.where(held, relative, 0).sum(axis=0) / jnp.maximum(count, 1)
    squares = jnp.where(held, jnp.square(relative - mean[None]), 0).sum()
    return Signature(mean, squares / jnp.maximum(count * (count - 1), 1))


def distance(one: Signature, others: Signature) -> Array:  # f32[C]
    """Square of the distance from other clients' means, over what chance alone would give: about 1
    between clients whose data are of one kind."""
    apart = jnp.square(others.mean - one.mean[None]).sum(axis=1)
    chance = one.spread + others.spread
    return apart / jnp.where(chance > 0, chance, 1)


def _unit(rows: Array) -> Array:
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms > 0, norms, 1)

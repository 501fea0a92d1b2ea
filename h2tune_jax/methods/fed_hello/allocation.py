"""Which layers Fed-HeLLo lets a client train: shapes over depth, and groups by Fisher score."""

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.types import Array

SHAPES = ("triangle", "inverted_triangle", "bottleneck", "uniform")

_BOTTLENECK = (3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3)
"""The public code's, for 12 layers from the input to the output; it divides by 27."""


def shape_weights(shape: str, num_layers: int) -> np.ndarray:  # f64[Li], sum 1
    """Return a shape's weight of each layer.

    A triangle stands on the input: its weights fall by equal steps towards the output, Li, ..., 1 (our
    reading). The bottleneck is read off at a layer's relative depth.
    """
    layers = np.arange(num_layers)
    weights = {
        "triangle": num_layers - layers,
        "inverted_triangle": layers + 1,
        "bottleneck": np.asarray(_BOTTLENECK)[(2 * layers + 1) * 12 // (2 * num_layers)],
        "uniform": np.ones(num_layers),
    }[shape]
    return weights / weights.sum()


def shape_order(shape: str, num_layers: int) -> np.ndarray:  # i64[Li]
    """Return the layers in the order in which a shape gives them out.

    By weight; among equals the layer farthest from those given already, then the lower one. So a
    client of a smaller budget holds a part of what one of a larger budget holds, and equal weights
    are spread over the depth.
    """
    weights, given = shape_weights(shape, num_layers), []
    for _ in range(num_layers):
        left = [layer for layer in range(num_layers) if layer not in given]
        far = lambda layer: min((abs(layer - other) for other in given), default=0)
        given.append(max(left, key=lambda layer: (weights[layer], far(layer), -layer)))
    return np.asarray(given)


def group_weights(scores: Array, steps: int = 20) -> Array:  # f32[Li] -> f32[Li], sum 1
    """Cluster scores into three groups by k-means; a layer of the low, middle, high group weighs 1, 2, 3.

    Starts from the scores at a sixth, a half and five sixths of their order and takes a fixed number of
    Lloyd's steps; a group that empties keeps its centre. In one dimension the centres keep their order.
    """
    count = scores.shape[0]
    places = np.asarray([count // 6, count // 2, (5 * count) // 6])
    centres = jnp.sort(scores)[places]

    def nearest(centres: Array) -> Array:  # i32[Li]; ties go to the lower group
        return jnp.abs(scores[:, None] - centres[None, :]).argmin(axis=1).astype(jnp.int32)

    def step(_, centres: Array) -> Array:
        members = nearest(centres)[:, None] == jnp.arange(3, dtype=jnp.int32)[None, :]
        held = members.sum(axis=0, dtype=scores.dtype)
        sums = jnp.where(members, scores[:, None], 0).sum(axis=0)
        return jnp.where(held > 0, sums / jnp.maximum(held, 1), centres)

    weights = 1 + nearest(jax.lax.fori_loop(0, steps, step, centres)).astype(scores.dtype)
    return weights / weights.sum()

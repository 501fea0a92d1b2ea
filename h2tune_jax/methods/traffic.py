"""How much travels, as arrays that a round can give as metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.types import Array, PyTree


class Units(NamedTuple):
    """So many of a tree of arrays, where only the program knows how many: a part of what travels."""

    many: Array  # a whole number or a boolean
    one: PyTree  # arrays, or their shapes
    most: int = 1


def traffic(*, up: PyTree, down: PyTree) -> dict[str, Array]:
    """Count what travels: all arrays of two trees, in which a part may be `Units`."""
    return {
        "numbers_up": numbers(up),
        "numbers_down": numbers(down),
        "bytes_up": _total(up, _bytes),
        "bytes_down": _total(down, _bytes),
    }


def numbers(tree: PyTree) -> Array:
    """Count the numbers in a tree, in which a part may be `Units`."""
    return _total(tree, lambda leaf: leaf.size)


def _bytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _total(tree: PyTree, size_of: Callable[[Any], int]) -> Array:
    """Add up, in i32 or, where that could overflow, in f32 (7 digits).

    One client's download of a large model passes 2^31, and JAX has no wider whole numbers by default.
    """
    is_units = lambda node: isinstance(node, Units)
    parts = jax.tree.leaves(tree, is_leaf=is_units)
    some = [part for part in parts if is_units(part)]
    whole = sum(size_of(part) for part in parts if not is_units(part))
    each = [sum(map(size_of, jax.tree.leaves(units.one))) for units in some]
    most = whole + sum(units.most * size for units, size in zip(some, each))
    dtype = np.dtype(np.int32 if most < 2**31 else np.float32)
    total = jnp.asarray(whole, dtype)
    for units, size in zip(some, each):
        total += units.many.astype(dtype) * jnp.asarray(size, dtype)
    return total

"""How many numbers travel, as arrays that a round can give as metrics."""

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.types import Array, PyTree


def count_dtype(most: int) -> np.dtype:
    """Return what holds counts up to `most`: i32, or f32 (7 digits) where that overflows.

    One client's download of a large model passes 2^31, and JAX has no wider whole numbers by default.
    """
    return np.dtype(np.int32 if most < 2**31 else np.float32)


def count_units(units: Array, each: int, *, most: int) -> Array:
    """Count `units`, `most` of them at most, of `each` numbers."""
    dtype = count_dtype(most * each)
    return units.astype(dtype) * jnp.asarray(each, dtype)


def size(tree: PyTree) -> Array:
    """Count the numbers in a tree."""
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    return jnp.asarray(total, count_dtype(total))


def traffic(*, up: PyTree, down: PyTree) -> dict[str, Array]:
    """Count what travels, where all of two trees does."""
    return {"numbers_up": size(up), "numbers_down": size(down)}

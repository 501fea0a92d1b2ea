"""Adapter dropout, on what enters an adapter: one rule for every form of a site."""

import jax
import jax.numpy as jnp

from h2tune_jax.types import Array


def drop(x: Array, rate: float, key: Array | None) -> Array:
    """Zero entries of x at a rate and scale up the others; without a key nothing is dropped."""
    if rate <= 0 or key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))

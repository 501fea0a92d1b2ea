"""What clients start from, the same in every method, so that methods can be compared seed by seed.

A client's key gives its head and its own factors, and a server's key and the architecture's name the
factors that an architecture has in common: the same numbers whatever the method, where the shapes are the
same.
"""

from typing import Any

import jax

from h2tune_jax.adapters import triple
from h2tune_jax.types import Array, CohortSpec, PyTree, fold_name

Parts = dict[str, Any]  # "a", "b": by kind T[Li, D, r], T[Li, r, F]; "head"; what else there is


def start_keys(key: Array, more: int = 0) -> tuple[Array, ...]:
    """Split a client's key: -> (for its factors, for its head, then so many more).

    The first two do not depend on how many there are (JAX's generator is partitionable), so a method that
    draws more starts with the same factors and head.
    """
    return tuple(jax.random.split(key, 2 + more))


def init_head(spec: CohortSpec, key: Array) -> PyTree:
    """Draw a client's head from the client's key; None where its cohort has none."""
    return None if spec.init_head_fn is None else spec.init_head_fn(start_keys(key)[1])


def init_factors(spec: CohortSpec, key: Array, rank: int | None = None) -> Parts:
    """Draw {"a", "b"} with dW = 0; the same key gives the same factors to all of equal shapes."""
    factors: Parts = {"a": {}, "b": {}}
    for kind in spec.kinds:
        factors["a"][kind], factors["b"][kind] = triple.init(
            fold_name(key, kind),
            spec.model.num_layers,
            *spec.model.shapes[kind],
            spec.rank if rank is None else rank,
            dtype=spec.dtype,
        )
    return factors


def init_params(spec: CohortSpec, key: Array) -> Parts:
    """Draw one client's factors and head from the client's key."""
    return {**init_factors(spec, start_keys(key)[0]), "head": init_head(spec, key)}

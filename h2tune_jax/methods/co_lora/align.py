"""Co-LoRA's common factors: which layers meet, and A and B fitted on public text, then frozen."""

import jax
import numpy as np

from h2tune_jax.adapters import anchor
from h2tune_jax.aggregate import architecture
from h2tune_jax.check import named_errors
from h2tune_jax.types import Array, CohortSpec, FederationError, PyTree, Specs, fold_name

Factors = dict[str, dict[str, Array]]  # "a", "b": by kind T[blocks, D, r], T[blocks, r, F]


def aligned_layers(num_layers: int, num_blocks: int) -> np.ndarray:  # i64[blocks]
    """Return the last layer of each of `num_blocks` equal blocks (equal up to rounding up)."""
    ends = (np.arange(1, num_blocks + 1) * num_layers + num_blocks - 1) // num_blocks
    return ends - 1


def fit_factors(
    specs: Specs, key: Array, bases: tuple, probe: PyTree, num_blocks: int
) -> dict[str, Factors]:
    """Fit every architecture's A and B, at the layers that meet, to those of a reference.

    The reference of a kind is the first of the deepest models that have it; its factors are random and
    orthonormal. Returns them by architecture.
    """
    if not isinstance(probe, tuple) or len(probe) != len(specs):
        raise FederationError(
            "co_lora needs a probe: the same public texts for every cohort, as a tuple of one entry a "
            f"cohort ({len(specs)}), given to init_round"
        )
    activations = {}
    for spec, base, texts in zip(specs, bases, probe):
        if architecture(spec) not in activations:
            with named_errors(spec, "site_activations_fn"):
                fn = spec.model.site_activations_fn
                assert fn is not None  # `check` saw to it
                activations[architecture(spec)] = fn(base, texts)

    def take(spec: CohortSpec, kind: str) -> tuple[Array, Array]:
        layers = aligned_layers(spec.model.num_layers, num_blocks)
        inputs, outputs = activations[architecture(spec)][kind]
        return inputs[layers], outputs[layers]

    fitted: dict[str, Factors] = {}
    for spec in specs:
        factors = fitted.setdefault(architecture(spec), {"a": {}, "b": {}})
        for kind in spec.kinds:
            if kind in factors["a"]:
                continue
            holders = [other for other in specs if kind in other.kinds]
            reference = max(holders, key=lambda other: other.model.num_layers)
            width, out = reference.model.shapes[kind]
            a_key, b_key = jax.random.split(fold_name(key, kind))
            draw = jax.vmap(anchor.orthonormal, in_axes=(0, None, None))
            a = draw(jax.random.split(a_key, num_blocks), width, spec.rank)
            b = draw(jax.random.split(b_key, num_blocks), out, spec.rank).mT
            if architecture(spec) != architecture(reference):
                own, theirs = take(spec, kind), take(reference, kind)
                a, _ = jax.vmap(anchor.fit_inputs)(own[0], theirs[0], a)
                b, _ = jax.vmap(anchor.fit_outputs)(own[1], theirs[1], b)
            factors["a"][kind], factors["b"][kind] = a.astype(spec.dtype), b.astype(spec.dtype)
    return fitted

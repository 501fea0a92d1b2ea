"""What H2Tune's clients start from: layer relations, coordinate scores, and bases."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from h2tune_jax.adapters import anchor, relation, triple
from h2tune_jax.aggregate import architecture
from h2tune_jax.check import named_errors
from h2tune_jax.methods.h2tune.options import H2TuneOptions
from h2tune_jax.methods.h2tune.state import Basis, Start, basis_name
from h2tune_jax.types import (
    Array,
    CohortSpec,
    FederationError,
    Places,
    PyTree,
    Specs,
    fold_name,
)


def make_starts(
    options: H2TuneOptions,
    specs: Specs,
    keys: tuple[Array, Array],
    bases: tuple,
    probe: tuple | None,
    slots: int,
    size: int,
) -> tuple[dict[str, Start], dict[str, Basis] | None]:
    """Draw or fit, once, what each cohort's clients start from: -> (starts by cohort, bases by name).

    `keys`: for scores and bases.
    """
    scores_key, basis_key = keys
    outputs = None
    if options.by_data:
        outputs = _on_probe("first_layer", specs, bases, probe, "similarity 'data'")
    relations = _relations(options, specs, bases, probe, slots)
    found, fits = None, {}
    if options.basis == "seeded":
        found = _once(specs, lambda place: _seeded(options, specs[place], basis_key, slots, size))
    elif options.basis == "singular":
        found = _once(
            specs, lambda place: _singular_vectors(options, specs[place], bases[place], size)
        )
    elif options.basis == "anchored":
        activations = _on_probe("site_activations_fn", specs, bases, probe, "basis 'anchored'")
        fitted = _once(
            specs, lambda place: _anchored(options, specs, place, basis_key, activations, size)
        )
        found = {name: basis for name, (basis, _) in fitted.items()}
        fits = {name: fit for name, (_, fit) in fitted.items()}
    starts = {
        spec.name: Start(
            relation=own,
            scores=_common_scores(options, spec, scores_key, size),
            fit=fits.get(basis_name(spec)),
            probe=None if outputs is None else outputs[place].astype(jnp.float32),
        )
        for place, (spec, own) in enumerate(zip(specs, relations))
    }
    return starts, found


def _once(specs: Specs, make_fn: Callable[[int], Any]) -> dict[str, Any]:
    """Make what cohorts of one `basis_name` have in common, for the first of them."""
    made: dict[str, Any] = {}
    for place, spec in enumerate(specs):
        if basis_name(spec) not in made:
            made[basis_name(spec)] = make_fn(place)
    return made


def places_of(options: H2TuneOptions, spec: CohortSpec) -> Places:
    """Return where a cohort's layers stand for the relation: in their model, or in the whole one."""
    own = relation.whole(spec.model.num_layers)
    return spec.model.places or own if options.relation == "places" else own


def _common_scores(
    options: H2TuneOptions, spec: CohortSpec, key: Array, size: int
) -> Array | None:  # T[Ki, R]
    if options.selection != "block":
        return None
    draw = lambda kind: triple.uniform(fold_name(key, kind), (size,), size, spec.dtype)
    return jnp.stack([draw(kind) for kind in spec.kinds])


def _on_probe(function: str, specs: Specs, bases: tuple, probe: tuple | None, why: str) -> list:
    """Run a function of every cohort's model on its part of the probe."""
    if not isinstance(probe, tuple) or len(probe) != len(specs):
        raise FederationError(
            f"{why} needs a probe: the same public texts for every cohort, as a tuple of one entry "
            f"a cohort ({len(specs)}), given to init_round"
        )
    results = []
    for spec, base, texts in zip(specs, bases, probe):
        with named_errors(spec, function):
            results.append(getattr(spec.model, function)(base, texts))
    return results


def _relations(
    options: H2TuneOptions, specs: Specs, bases: tuple, probe: tuple | None, slots: int
) -> list[Array | None]:
    if options.relation == "random":
        return [None] * len(specs)
    if options.relation in ("depth", "places"):
        places = (places_of(options, spec) for spec in specs)
        return [relation.at_places(slots, own, spec.dtype) for own, spec in zip(places, specs)]
    outputs = _on_probe("layer_outputs_fn", specs, bases, probe, "relation 'cka'")
    grams = [relation.gram(activations) for activations in outputs]
    # The first of the deepest models is the reference: none of its layers is without a slot.
    reference = max(grams, key=len)
    aligned = [relation.cka(gram, reference, num_slots=slots) for gram in grams]
    return [matrix.astype(spec.dtype) for spec, matrix in zip(specs, aligned)]


def _seeded(options: H2TuneOptions, spec: CohortSpec, key: Array, slots: int, size: int) -> Basis:
    """Draw by relative depth, the same for every model of equal width."""
    nearest = relation.nearest_slots(slots, places_of(options, spec))
    bases: Basis = {}
    for kind in spec.kinds:
        in_dim, out_dim = spec.model.shapes[kind]
        a_key, b_key = jax.random.split(fold_name(key, kind))
        columns = triple.basis(a_key, nearest, in_dim, size, spec.dtype)
        rows = None
        if not options.residual:
            rows = triple.basis(b_key, nearest, out_dim, size, spec.dtype)
        bases[kind] = columns, rows
    return bases


def _singular_vectors(options: H2TuneOptions, spec: CohortSpec, base: PyTree, size: int) -> Basis:
    """Take the leading singular vectors of every frozen weight.

    Their signs are such that the largest entry of a left one is positive.
    """
    assert spec.model.site_weights_fn is not None  # refused by `check`
    with named_errors(spec, "site_weights_fn"):
        weights = spec.model.site_weights_fn(base)
    bases: Basis = {}
    for kind in spec.kinds:
        weight = weights[kind].astype(jnp.float32)
        left, _, right = jnp.linalg.svd(weight, full_matrices=False)
        left, right = left[..., :size], right[..., :size, :]
        peak = jnp.take_along_axis(left, jnp.abs(left).argmax(axis=-2, keepdims=True), axis=-2)
        sign = jnp.where(peak < 0, -1.0, 1.0)
        rows = None if options.residual else (right * sign.mT).mT.astype(spec.dtype)
        bases[kind] = (left * sign).astype(spec.dtype), rows
    return bases


def _anchored(
    options: H2TuneOptions, specs: Specs, place: int, key: Array, activations: list, size: int
) -> tuple[Basis, Basis]:
    """Fit a model's sites to those of a reference at the same relative depth: -> (basis, its fit)."""
    spec, own = specs[place], activations[place]
    basis: Basis = {}
    fit: Basis = {}
    for kind in spec.kinds:
        # The reference of a kind: the first of the deepest models that have it.
        holders = [i for i, other in enumerate(specs) if kind in other.kinds]
        chosen = max(holders, key=lambda i: specs[i].model.num_layers)
        theirs, deep = activations[chosen], specs[chosen].model.num_layers
        nearest = relation.nearest_layers(
            places_of(options, spec), places_of(options, specs[chosen])
        )
        a_key, b_key = jax.random.split(fold_name(key, kind))
        a_keys, b_keys = jax.random.split(a_key, deep), jax.random.split(b_key, deep)
        if architecture(spec) == architecture(specs[chosen]):  # the reference itself
            in_dim, out_dim = spec.model.shapes[kind]
            draw = jax.vmap(anchor.orthonormal, in_axes=(0, None, None, None))
            rows = None if options.residual else draw(b_keys, out_dim, size, spec.dtype)
            basis[kind] = draw(a_keys, in_dim, size, spec.dtype), rows
            fit[kind] = jnp.ones(deep), None if rows is None else jnp.ones(deep)
            continue
        inputs, outputs = own[kind]
        ref_inputs, ref_outputs = (side[nearest] for side in theirs[kind])

        def fit_a(x, reference, key):
            a_ref = anchor.orthonormal(key, reference.shape[-1], size)
            return anchor.fit_inputs(x, reference, a_ref)

        def fit_b(y, reference, key):
            b_ref = anchor.orthonormal(key, reference.shape[-1], size).T
            b, quality = anchor.fit_outputs(y, reference, b_ref)
            return b.T, quality

        columns, a_fit = jax.vmap(fit_a)(inputs, ref_inputs, a_keys[nearest])
        rows = b_fit = None
        if not options.residual:
            rows, b_fit = jax.vmap(fit_b)(outputs, ref_outputs, b_keys[nearest])
            rows = rows.astype(spec.dtype)
        basis[kind] = columns.astype(spec.dtype), rows
        fit[kind] = a_fit, b_fit
    return basis, fit

"""H2Tune's server: its start, what it sends, and how it averages."""

import jax
import jax.numpy as jnp

from h2tune_jax import aggregate
from h2tune_jax.methods.h2tune.options import H2TuneOptions
from h2tune_jax.methods.h2tune.start import make_starts
from h2tune_jax.methods.h2tune.state import (
    H2TuneDownload,
    H2TuneServer,
    H2TuneUpload,
    kind_places,
    shared_kinds,
)
from h2tune_jax.types import (
    Array,
    CohortSpec,
    Download,
    FederationError,
    PyTree,
    Specs,
    at_least_float32,
)


def shared_rank(options: H2TuneOptions, specs: Specs) -> int:
    """Return R."""
    return options.shared_rank or max(spec.rank for spec in specs)


def check(options: H2TuneOptions, specs: Specs) -> None:
    """Refuse federations that H2Tune cannot serve."""
    size = shared_rank(options, specs)
    for spec in specs:
        where = f"cohort {spec.name!r}"
        if spec.rank > size:
            raise FederationError(f"{where}: rank {spec.rank} is above shared_rank R = {size}")
        if not spec.kinds:
            raise FederationError(f"{where}: targets is empty; h2tune shares adapted sites")
        if spec.dtype != specs[0].dtype:
            raise FederationError(
                f"{where}: dtype {spec.dtype} differs from {specs[0].dtype} of cohort "
                f"{specs[0].name!r}; the shared matrices have one dtype"
            )
        if options.relation == "cka" and spec.model.layer_outputs_fn is None:
            raise FederationError(f"{where}: relation 'cka' needs model.layer_outputs_fn")
        if options.basis == "anchored" and spec.model.site_activations_fn is None:
            raise FederationError(f"{where}: basis 'anchored' needs model.site_activations_fn")


def init_server(
    options: H2TuneOptions, specs: Specs, key: Array, bases: tuple, probe: PyTree
) -> H2TuneServer:
    """Start G, and draw what each cohort's clients will start from."""
    size, dtype = shared_rank(options, specs), specs[0].dtype
    slots = options.num_slots or max(spec.model.num_layers for spec in specs)
    middle_key, scores_key, basis_key = jax.random.split(key, 3)
    shape = (slots, len(shared_kinds(specs)), size, size)
    if options.g_init == "zero":
        middle = jnp.zeros(shape, dtype)
    else:
        bound = 1 / (size * 7**0.5)
        middle = jax.random.uniform(middle_key, shape, dtype, -bound, bound)

    starts = make_starts(options, specs, (scores_key, basis_key), bases, probe, slots, size)
    return H2TuneServer(middle, starts)


def broadcast(
    specs: Specs, key: Array, server: H2TuneServer, client_ids: tuple, round_index: Array
) -> tuple[Download, ...]:
    """Send every participant G of the kinds that it has."""
    del key, client_ids, round_index
    return tuple(
        Download(H2TuneDownload(server.middle[:, kind_places(specs, spec)], start), ())
        for spec, start in zip(specs, server.starts)
    )


def reduce(spec: CohortSpec, upload: H2TuneUpload, weight: Array) -> tuple[Array, Array]:
    """One client's summand of the mean, entry by entry where it counts."""
    del spec
    return aggregate.weighted_part(upload.middle, weight, upload.mask)


def server_aggregate(
    specs: Specs,
    key: Array,
    server: H2TuneServer,
    bases: tuple,
    probe: PyTree,
    uploads: tuple,
    weights: tuple,
    client_ids: tuple,
    round_index: Array,
) -> tuple[H2TuneServer, dict]:
    """G <- sum w_i G_i / sum w_i over those who have the slot, the kind and (selected) the entry."""
    del key, bases, probe, weights, client_ids, round_index
    total = jnp.zeros_like(server.middle, dtype=at_least_float32(server.middle.dtype))
    share = jnp.zeros_like(total)
    for spec, part in zip(specs, uploads):
        if part is not None:
            places = kind_places(specs, spec)
            total = total.at[:, places].add(part[0])
            share = share.at[:, places].add(jnp.broadcast_to(part[1], part[0].shape))
    middle = aggregate.mean_or_keep(total, share, server.middle)
    seen = {
        "shared_norm": jnp.linalg.norm(middle.ravel()),
        "shared_change": jnp.linalg.norm((middle - server.middle).ravel()),
    }
    return server._replace(middle=middle), seen

"""H2Tune's server: its start, what it sends, and how it averages."""

from typing import Any

import jax
import jax.numpy as jnp

from h2tune_jax import aggregate
from h2tune_jax.methods.h2tune.likeness import empty
from h2tune_jax.methods.h2tune.options import H2TuneOptions
from h2tune_jax.methods.h2tune.similar import hear
from h2tune_jax.methods.h2tune.start import make_starts, places_of
from h2tune_jax.methods.h2tune.state import (
    H2TuneDownload,
    H2TuneServer,
    H2TuneUpload,
    basis_of,
    kind_places,
    shared_kinds,
)
from h2tune_jax.methods.latest import Latest, for_each, nobody_yet, note_round
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
    return options.shared_rank or max(options.side(spec) for spec in specs)


def check(options: H2TuneOptions, specs: Specs) -> None:
    """Refuse federations that H2Tune cannot serve."""
    size = shared_rank(options, specs)
    for spec in specs:
        where = f"cohort {spec.name!r}"
        side = options.side(spec)
        if side > size:
            name = "rank" if options.core_rank is None else "core_rank"
            raise FederationError(f"{where}: {name} {side} is above shared_rank R = {size}")
        if not spec.kinds:
            raise FederationError(f"{where}: targets is empty; h2tune shares adapted sites")
        if spec.dtype != specs[0].dtype:
            raise FederationError(
                f"{where}: dtype {spec.dtype} differs from {specs[0].dtype} of cohort "
                f"{specs[0].name!r}; the shared matrices have one dtype"
            )
        if options.relation == "cka" and spec.model.layer_outputs_fn is None:
            raise FederationError(f"{where}: relation 'cka' needs model.layer_outputs_fn")
        first = spec.model.first_layer_fn or spec.model.layer_outputs_fn
        if options.by_data and first is None:
            raise FederationError(
                f"{where}: similarity 'data' needs model.first_layer_fn or model.layer_outputs_fn"
            )
        if options.basis == "anchored" and spec.model.site_activations_fn is None:
            raise FederationError(f"{where}: basis 'anchored' needs model.site_activations_fn")
        if options.basis == "singular":
            if spec.model.site_weights_fn is None:
                raise FederationError(f"{where}: basis 'singular' needs model.site_weights_fn")
            kind = min(spec.kinds, key=lambda kind: min(spec.model.shapes[kind]))
            if min(spec.model.shapes[kind]) < size:
                raise FederationError(
                    f"{where}: basis 'singular': site {kind!r} has {min(spec.model.shapes[kind])} "
                    f"singular vectors, shared_rank R = {size} asks for more"
                )
        if options.parallel and spec.kernels == "triton":
            raise FederationError(f"{where}: kernels 'triton': no kernel computes core 'parallel'")


def init_server(
    options: H2TuneOptions, specs: Specs, key: Array, bases: tuple, probe: PyTree
) -> H2TuneServer:
    """Start G, and draw what each cohort's clients will start from."""
    size, dtype = shared_rank(options, specs), specs[0].dtype
    slots = options.num_slots or max(places_of(options, spec).depth for spec in specs)
    middle_key, scores_key, basis_key = jax.random.split(key, 3)
    shape = (slots, len(shared_kinds(specs)), size, size)
    if options.g_init == "zero":
        middle = jnp.zeros(shape, dtype)
    else:
        bound = 1 / (size * 7**0.5)
        middle = jax.random.uniform(middle_key, shape, dtype, -bound, bound)

    keys = scores_key, basis_key
    starts, found = make_starts(options, specs, keys, bases, probe, slots, size)
    latest = ()
    if options.sharing == "similar":
        latest = tuple(
            _nobody_yet(options, spec, shape, dtype, starts[spec.name].probe) for spec in specs
        )
    return H2TuneServer(middle, starts, latest, found)


def _nobody_yet(
    options: H2TuneOptions,
    spec: CohortSpec,
    shape: tuple[int, ...],
    dtype: Any,
    probe: Array | None,
) -> Latest:
    own = shape[0], len(spec.kinds), *shape[2:]
    mask = own if options.average == "selected" else (shape[0], 1, 1, 1)
    signature = None if probe is None else empty(len(probe))
    silent = H2TuneUpload(jnp.zeros(own, dtype), jnp.zeros(mask, bool), signature)
    return nobody_yet(spec.num_clients, silent)


def broadcast(
    options: H2TuneOptions,
    specs: Specs,
    key: Array,
    server: H2TuneServer,
    client_ids: tuple,
    round_index: Array,
) -> tuple[Download, ...]:
    """Send every participant G of the kinds that it has: the mean, or one of its own."""
    del key, round_index
    downloads = []
    for place, (spec, ids) in enumerate(zip(specs, client_ids)):
        own = ()
        if options.sharing == "similar":
            mean_fn = lambda i, at=place: hear(options, specs, server, at, i)
            own = for_each(ids, mean_fn)
        middle = server.middle[:, kind_places(specs, spec)]
        common = H2TuneDownload(middle, server.starts[spec.name], basis_of(server, spec))
        downloads.append(Download(common, own))
    return tuple(downloads)


def reduce(
    options: H2TuneOptions, spec: CohortSpec, upload: H2TuneUpload | tuple[()], weight: Array
) -> tuple:
    """One client's summand of the mean, entry by entry where it counts; nothing of nothing."""
    del spec
    if options.sharing == "none":
        return ()
    assert isinstance(upload, H2TuneUpload)
    return aggregate.weighted_part(upload.middle, weight, upload.mask)


def server_aggregate(
    options: H2TuneOptions,
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
    """G <- sum w_i G_i / sum w_i over those who have the slot, the kind and (selected) the entry.

    Where clients get a mean of their own, what each has sent is noted until it is asked for.
    """
    del key, bases, probe, round_index
    if options.sharing == "none":
        return server, {}
    if options.sharing == "similar":
        latest = note_round(server.latest, uploads, weights, client_ids)
        heard = sum((one.weights > 0).sum(dtype=jnp.int32) for one in latest)
        return server._replace(latest=latest), {"heard": heard}
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

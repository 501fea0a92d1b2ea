"""One H2Tune client: its start, its round, and the adapters that come of it."""

import functools

import jax
import jax.numpy as jnp

from h2tune_jax.adapters import relation, triple
from h2tune_jax.method import DriftFn
from h2tune_jax.methods.h2tune.likeness import signature
from h2tune_jax.methods.h2tune.options import H2TuneHyper, H2TuneOptions
from h2tune_jax.methods.h2tune.state import (
    H2TuneClient,
    H2TuneDownload,
    H2TuneServer,
    H2TuneUpload,
    basis_of,
)
from h2tune_jax.methods.h2tune.steps import (
    LocalRound,
    LocalState,
    alternating_step,
    core_of,
    joint_step,
    middle_of,
    own_part,
    select,
    shared_part,
    site_adapters,
)
from h2tune_jax.methods.start import init_head, start_keys
from h2tune_jax.methods.traffic import Units, traffic
from h2tune_jax.training import narrow, run_steps, widen
from h2tune_jax.types import (
    Adapters,
    Array,
    ClientData,
    CohortSpec,
    Download,
    PyTree,
    fold_name,
)


def init_client(
    options: H2TuneOptions, spec: CohortSpec, key: Array, base: PyTree, download: Download
) -> H2TuneClient:
    """Draw a client's personal state; of the download only the shapes and the start matter."""
    del base
    common: H2TuneDownload = download.common
    start = common.start
    slots, num_kinds, size, _ = common.middle.shape
    layers, dtype = spec.model.num_layers, spec.dtype
    factor_key, _, scores_key, index_key, relation_key = start_keys(key, more=3)

    scores = None
    if start.scores is not None:
        scores = jnp.broadcast_to(start.scores, (layers, num_kinds, size))
    elif options.has_scores:
        scores = triple.uniform(scores_key, (layers, num_kinds, size, size), size, dtype)
    none_yet = jnp.zeros((layers, num_kinds, size, size), dtype)
    index = triple.select(
        scores, options.side(spec), strategy=options.selection, middle=none_yet, key=index_key
    )

    a, b = {}, {}
    for place, kind in enumerate(spec.kinds):
        in_dim, out_dim = spec.model.shapes[kind]
        if common.basis is None or options.parallel:
            kind_key = fold_name(factor_key, kind)
            shape = layers, in_dim, out_dim, spec.rank
            from_zero = options.residual or options.parallel
            a[kind], b[kind] = triple.init(kind_key, *shape, residual=from_zero, dtype=dtype)
        else:
            columns, rows = common.basis[kind]
            chosen = triple.coordinates(index[:, place], spec.rank, size)
            a[kind] = triple.take_columns(columns, chosen)
            b[kind] = (
                jnp.zeros((layers, spec.rank, out_dim), dtype)
                if rows is None
                else triple.take_columns(rows, chosen).mT
            )
    own_relation = start.relation
    if own_relation is None:
        own_relation = relation.random(relation_key, slots, layers, dtype)
    client = H2TuneClient(
        a=a,
        b=b,
        head=init_head(spec, key),
        relation=own_relation,
        scores=scores,
        active=index,
        middle=none_yet,
        copy=common.middle if options.sharing == "none" else None,
        trained=jnp.zeros((), bool),
        shared_opt=(),
        own_opt=(),
    )
    if options.optimizer_state == "kept":
        shared = shared_part(options, client, common.middle)
        client = client._replace(
            shared_opt=options.transform.init(widen(shared)),
            own_opt=options.transform.init(widen(own_part(options, client))),
        )
    return client


def received(options: H2TuneOptions, client: H2TuneClient, download: Download) -> Array:
    """Return the G [L, Ki, R, R] that a client works with in a round."""
    if options.sharing == "none":
        assert client.copy is not None
        return client.copy
    return download.personal if options.sharing == "similar" else download.common.middle


def at_download(
    options: H2TuneOptions, spec: CohortSpec, client: H2TuneClient, download: Download
) -> H2TuneClient:
    """Select for this round; where A and B stand for coordinates of a basis, let them follow."""
    common: H2TuneDownload = download.common
    middle = relation.mix(client.relation, received(options, client, download))
    index = select(options, spec, client, client.scores, middle)
    if options.follows_basis:
        assert common.basis is not None
        a, b = {}, {}
        coordinates = functools.partial(triple.coordinates, rank=spec.rank, size=middle.shape[-1])
        for place, kind in enumerate(spec.kinds):
            columns, rows = common.basis[kind]
            a[kind], b[kind] = jax.vmap(triple.realign)(
                client.a[kind],
                client.b[kind],
                coordinates(client.active[:, place]),
                coordinates(index[:, place]),
                columns,
                None if rows is None else rows.mT,
            )
        client = client._replace(a=a, b=b)
    return client._replace(active=index)


def client_update(
    options: H2TuneOptions,
    spec: CohortSpec,
    key: Array,
    base: PyTree,
    client: H2TuneClient,
    download: Download,
    data: ClientData,
    hyper: H2TuneHyper,
    round_index: Array,
    *,
    drift_fn: DriftFn | None = None,
) -> tuple[H2TuneClient, H2TuneUpload | tuple[()], dict]:
    """Download and select, train in halves (or jointly, in a warm start), upload G_i.

    Parts of 16 bits are trained in float32 (`widen`), and kept and sent in 16 bits.
    """
    client = at_download(options, spec, client, download)
    downloaded = received(options, client, download)
    wide = widen(client)
    shared, own = shared_part(options, wide, widen(downloaded)), own_part(options, wide)
    kept = options.optimizer_state == "kept"
    here = LocalRound(
        options, spec, base, client, wide, hyper, download.common.basis, downloaded.shape[-1],
        shared["middle"], drift_fn,
    )  # fmt: skip
    state = LocalState(
        shared=shared,
        own=own,
        shared_opt=client.shared_opt if kept else options.transform.init(shared),
        own_opt=client.own_opt if kept else options.transform.init(own),
        touched=here.entries(client.active),
    )

    def run(step_fn) -> tuple[LocalState, dict]:
        return run_steps(spec.budget, key, data, state, functools.partial(step_fn, here))

    if options.alternation == "joint":
        state, metrics = run(joint_step)
    elif options.warmup_rounds == 0:
        state, metrics = run(alternating_step)
    else:
        state, metrics = jax.lax.cond(
            round_index < options.warmup_rounds,
            lambda: run(joint_step),
            lambda: run(alternating_step),
        )

    middle = middle_of(options, wide, state.shared)
    if options.trains_copy:
        sent = state.shared["middle"]
    else:
        sent = relation.unmix(wide.relation, middle)
    sent = narrow(sent, downloaded)
    if options.average == "selected":
        mask, each = state.touched, jax.ShapeDtypeStruct((), sent.dtype)
    else:
        mask = relation.slot_support(client.relation)[:, None, None, None]
        each = sent[0]
    after = client._replace(
        a=state.own.get("a", client.a),
        b=state.own.get("b", client.b),
        head=state.own["head"],
        relation=state.shared.get("relation", client.relation),
        scores=state.shared.get("scores", client.scores),
        active=here.selection(state.shared),
        middle=middle,
        copy=sent if options.sharing == "none" else None,
        trained=client.trained | (metrics["steps"] > 0),
        shared_opt=state.shared_opt if kept else (),
        own_opt=state.own_opt if kept else (),
    )
    after = narrow(after, client)
    if options.sharing == "none":
        return after, (), {**metrics, **traffic(up=(), down=())}
    described = None
    if options.by_data:
        probe, examples = download.common.start.probe, options.signature_examples
        described = signature(spec, base, data, probe, examples)
    entries = Units(mask.sum(dtype=jnp.int32), each, mask.size)
    counts = traffic(up=(entries, described), down=downloaded)
    return after, H2TuneUpload(sent, mask, described), {**metrics, **counts}


def adapters(
    options: H2TuneOptions,
    spec: CohortSpec,
    server: H2TuneServer,
    client: H2TuneClient,
    download: Download | None,
) -> Adapters:
    """Build the adapters as local training left them or, given a download, right after it."""
    middle = client.middle
    if download is not None:
        client = at_download(options, spec, client, download)
        middle = relation.mix(client.relation, received(options, client, download))
    core, basis = core_of(options, spec, middle, client.active), basis_of(server, spec)
    sites = site_adapters(options, spec, basis, client.a, client.b, core, client.active)
    return Adapters(sites, client.head)

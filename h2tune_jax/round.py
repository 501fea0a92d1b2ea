"""The engine: a round of federated training as one pure function of arrays.

This is the one place with `jit` and with a client axis. Methods are written for one client; here they
are batched over the clients of a cohort by `vmap`, by `scan`, or in chunks, on one device or many.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from h2tune_jax.check import check_federation, check_mesh, check_round_inputs, named_errors
from h2tune_jax.method import FederatedMethod
from h2tune_jax.training import all_finite, trim
from h2tune_jax.types import (
    Array,
    ClientData,
    CohortSpec,
    Download,
    FederationError,
    Metrics,
    PyTree,
    RoundState,
    Specs,
    fold_name,
)

ClientAxis = str | int  # "auto", "vmap", "scan", or the size of a chunk


class RoundMetrics(NamedTuple):
    """What people look at after a round."""

    clients: dict[str, dict[str, Array]]  # by cohort and metric: [S]
    server: Metrics
    rejected: dict[str, Array]  # by cohort: i32[], clients whose result was not finite


def client_keys(key: Array, spec: CohortSpec, ids: Array) -> Array:
    """Fold the cohort's name and the clients' ids into a key: who else takes part does not matter."""
    return jax.vmap(lambda i: jax.random.fold_in(fold_name(key, spec.name), i))(ids)


def init_round(
    method: FederatedMethod, specs: Specs, bases: tuple, probe: tuple | None, key: Array
) -> RoundState:
    """Start a federation: the server, and every client of every cohort.

    `bases` has one frozen base a cohort; `probe`, for methods that ask for one, the same public texts
    as each cohort's model reads them.
    Pure: it may be jitted, and vmapped over keys.
    """
    check_federation(method, specs, bases)
    start = _starter(method.init_server, method.broadcast, method.init_client, specs)
    return start(bases, probe, key)


@functools.lru_cache(maxsize=64)
def _starter(init_server, broadcast, init_client, specs: Specs) -> Callable[..., RoundState]:
    """One program instead of one for every operation, and one for all keys."""

    @jax.jit
    def start(bases: tuple, probe: PyTree, key: Array) -> RoundState:
        server_key, client_key = jax.random.split(key)
        server = init_server(specs, server_key, bases, probe)
        ids = tuple(jnp.arange(spec.num_clients, dtype=jnp.int32) for spec in specs)
        first = jnp.zeros((), jnp.int32)
        downloads = broadcast(specs, server_key, server, ids, first)
        clients = []
        for spec, base, cohort_ids, (common, personal) in zip(specs, bases, ids, downloads):
            begin = lambda key, personal, spec=spec, base=base, common=common: init_client(
                spec, key, base, Download(common, personal)
            )
            with named_errors(spec, "init_client"):
                clients.append(jax.vmap(begin)(client_keys(client_key, spec, cohort_ids), personal))
        return RoundState(first, server, tuple(clients))

    return start


def start_server(
    method: FederatedMethod, specs: Specs, bases: tuple, probe: tuple | None, key: Array
) -> PyTree:
    """Start the server alone, as `init_round` does with the same key."""
    check_federation(method, specs, bases)
    return _server_starter(method.init_server, specs)(bases, probe, key)


def start_clients(
    method: FederatedMethod,
    specs: Specs,
    base: PyTree,
    server: PyTree,
    cohort: int,
    ids: Array,
    key: Array,
) -> PyTree:  # leaves [len(ids), ...]
    """Start the named clients of one cohort, as `init_round` does with the same key.

    `server` may be that of any round: what a client starts from never changes. A client's start is the
    same bit for bit whoever is named beside it, as long as equally many are named.
    """
    start = _client_starter(method.broadcast, method.init_client, specs, cohort)
    return start(base, server, ids, key)


@functools.lru_cache(maxsize=64)
def _server_starter(init_server, specs: Specs) -> Callable:
    @jax.jit
    def start(bases: tuple, probe: PyTree, key: Array) -> PyTree:
        return init_server(specs, jax.random.split(key)[0], bases, probe)

    return start


@functools.lru_cache(maxsize=64)
def _client_starter(broadcast, init_client, specs: Specs, cohort: int) -> Callable:
    spec = specs[cohort]

    @jax.jit
    def start(base: PyTree, server: PyTree, ids: Array, key: Array) -> PyTree:
        server_key, client_key = jax.random.split(key)
        named = tuple(ids if i == cohort else ids[:0] for i in range(len(specs)))
        first = jnp.zeros((), jnp.int32)
        common, personal = broadcast(specs, server_key, server, named, first)[cohort]

        def begin(args):
            key, personal = args
            return init_client(spec, key, base, Download(common, personal))

        # One after the other: a client's bits do not depend on its place among the others.
        with named_errors(spec, "init_client"):
            return jax.lax.map(begin, (client_keys(client_key, spec, ids), personal))

    return start


def make_round(
    method: FederatedMethod,
    specs: Specs,
    *,
    client_axis: ClientAxis = "auto",
    mesh: Mesh | None = None,
    resident: bool = True,
    donate: bool = True,
) -> Callable[..., tuple[RoundState, RoundMetrics]]:
    """Build the jitted function of one round.

    `round_fn(state, bases, data, client_ids, weights, hyper, seed, probe=None) -> (state, metrics)`:
      state: what `init_round` or the last round gave. Its buffers are donated unless `donate=False`.
      bases: one frozen base a cohort, shared by its clients and never copied.
      data: one `ClientData` a cohort, leaves [C, ...].
      client_ids: i32[S] a cohort, the clients that take part; None means all in order, which saves a
        gather. i32[0] leaves the cohort out. None in the place of the tuple means all of all.
      weights: f32[S] a cohort, or None for 1 each. A client of weight zero trains for itself, and the
        server does not notice.
      hyper: as `method.hyper`; arrays, so that runs can be mapped over them.
      seed: an integer scalar. Seed, round and client ids are all that randomness depends on.

    A client whose loss, upload or next state is not finite, and an id that is out of range or stands
    there a second time, changes nothing and is counted in `metrics.rejected`.

    Args:
      method: what to run.
      specs: the cohorts.
      client_axis: how the clients of a cohort run: "vmap" at once, "scan" one after the other, an int
        that many at once; "auto" is "scan" on CPU and "vmap" elsewhere. Results are equal up
        to rounding.
      mesh: a mesh with one (Auto) axis; each cohort's participants are split over its devices.
      resident: False when state and data hold the participants only, in the order of `client_ids`.
      donate: give the state's buffers to the result.
    """
    check_federation(method, specs, None)
    axis = resolve_axis(client_axis)
    if mesh is not None:
        check_mesh(mesh)
    sweep = _sweep if mesh is None else _sharded_sweep(mesh)

    def round_fn(state, bases, data, client_ids, weights, hyper, seed, probe=None):
        client_ids = (None,) * len(specs) if client_ids is None else client_ids
        weights = (None,) * len(specs) if weights is None else weights
        check_round_inputs(method, specs, state, bases, data, client_ids, weights, hyper, resident)
        # One dtype whatever is given: an integer rate would round a schedule to 0 or 1.
        hyper = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), hyper, method.hyper)
        key = jax.random.fold_in(jax.random.key(seed), state.round)
        ids = tuple(
            jnp.arange(spec.num_clients, dtype=jnp.int32) if chosen is None else chosen
            for spec, chosen in zip(specs, client_ids)
        )
        weights = tuple(
            jnp.ones(i.shape, jnp.float32) if w is None else w.astype(jnp.float32)
            for i, w in zip(ids, weights)
        )
        send_key, train_key, server_key = jax.random.split(key, 3)
        downloads = method.broadcast(specs, send_key, state.server, ids, state.round)

        clients, uploads, counted, metrics, rejected = [], [], [], {}, {}
        for i, spec in enumerate(specs):
            if ids[i].shape[0] == 0:
                clients.append(state.clients[i])
                uploads.append(None)
                counted.append(weights[i])
                metrics[spec.name], rejected[spec.name] = {}, jnp.zeros((), jnp.int32)
                continue
            valid, positions = jnp.ones(ids[i].shape, bool), None
            if client_ids[i] is not None:
                valid = _first_in_range(ids[i], spec.num_clients)
                if resident:
                    positions = jnp.where(valid, ids[i], spec.num_clients)
            shared = bases[i], downloads[i].common, hyper, state.round
            keys = client_keys(train_key, spec, ids[i])
            per_client = keys, downloads[i].personal, weights[i], valid
            train = functools.partial(_train_client, method, spec)
            with named_errors(spec, "client_update"):
                after, upload, seen = sweep(
                    train, shared, state.clients[i], data[i], per_client, positions, axis,
                    method.reduce is not None,
                )  # fmt: skip
            clients.append(after)
            uploads.append(upload)
            counted.append(jnp.where(seen.pop("counts"), weights[i], 0.0))
            metrics[spec.name] = seen
            rejected[spec.name] = (~seen["finite"]).sum(dtype=jnp.int32)

        server, server_metrics = method.server_aggregate(
            specs, server_key, state.server, bases, probe, tuple(uploads), tuple(counted), ids,
            state.round,
        )  # fmt: skip
        next_state = RoundState(state.round + 1, server, tuple(clients))
        return next_state, RoundMetrics(metrics, server_metrics, rejected)

    return jax.jit(round_fn, donate_argnums=(0,) if donate else ())


def resolve_axis(client_axis: ClientAxis) -> ClientAxis:
    """Return "vmap", "scan" or a chunk size; "auto" is what measures best on the default backend."""
    if client_axis == "auto":
        return "scan" if jax.default_backend() == "cpu" else "vmap"
    if client_axis in ("vmap", "scan") or (
        isinstance(client_axis, int) and not isinstance(client_axis, bool) and client_axis > 0
    ):
        return client_axis
    raise FederationError(
        f"client_axis: expected 'auto', 'vmap', 'scan' or a positive int, got {client_axis!r}"
    )


def _first_in_range(ids: Array, num_clients: int) -> Array:
    """Which of the ids name a client, and for the first time."""
    order = jnp.arange(ids.shape[0], dtype=jnp.int32)
    in_range = (ids >= 0) & (ids < num_clients)
    place = jnp.where(in_range, ids, num_clients)
    first = jnp.full(num_clients, ids.shape[0], jnp.int32).at[place].min(order, mode="drop")
    return in_range & (first.at[place].get(mode="clip") == order)


def _train_client(
    method: FederatedMethod,
    spec: CohortSpec,
    shared: tuple,
    client: PyTree,
    data,
    per_client: tuple,
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """One client's part of a round: -> (its next state, what it adds for the server, metrics)."""
    base, common, hyper, round_index = shared
    key, personal, weight, valid = per_client
    data = trim(ClientData(*data))
    after, upload, metrics = method.client_update(
        spec, key, base, client, Download(common, personal), data, hyper, round_index
    )
    finite = valid & all_finite((metrics["loss"], upload, after))
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, client)
    # Who has nothing to train on has nothing to say.
    counts = finite & (weight > 0) & jnp.isfinite(weight) & (data.num_examples > 0)
    if method.reduce is not None:
        upload = method.reduce(spec, upload, weight)
    # A product with weight zero is not enough: 0 * nan is nan.
    upload = jax.tree.map(lambda leaf: jnp.where(counts, leaf, jnp.zeros_like(leaf)), upload)
    return after, upload, {**metrics, "finite": finite, "counts": counts}


def _take(tree: PyTree, place: Array | None) -> PyTree:
    """Read rows; a place out of range reads the nearest."""
    if place is None:
        return tree
    if place.ndim == 0:  # a slice, where a gather would copy element by element
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), tree)
    return jax.tree.map(lambda x: x.at[place].get(mode="clip"), tree)


def _put(tree: PyTree, place: Array | None, rows: PyTree) -> PyTree:
    """Write rows back. A place out of range writes nothing new: its row is as it was read."""
    if place is None:
        return rows
    if place.ndim == 0:
        write = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda x, row: write(x, row, place, 0), tree, rows)
    return jax.tree.map(lambda x, row: x.at[place].set(row, mode="drop"), tree, rows)


def _sweep(train, shared, clients, data, per_client, positions, axis: ClientAxis, summed: bool):
    """Train a cohort's participants: -> (all clients, summed or stacked uploads, metrics).

    `clients` and `data` lead with C and are read and written at `positions` (None: all in order), one
    row at a time where the axis is a scan, so that no second copy of the personal state exists.
    """
    total = lambda tree: jax.tree.map(lambda leaf: leaf.sum(axis=0), tree)
    many = jax.vmap(train, in_axes=(None, 0, 0, 0))
    if axis == "vmap":
        rows = _take(clients, positions), _take(data, positions)
        after, uploads, metrics = many(shared, *rows, per_client)
        return _put(clients, positions, after), total(uploads) if summed else uploads, metrics

    count = per_client[-1].shape[0]
    places = jnp.arange(count, dtype=jnp.int32) if positions is None else positions
    width = 1 if axis == "scan" else min(int(axis), count)
    train = jax.jit(train, inline=True)  # traced once, for its shapes and for the loop

    def visit(carry, x):
        clients, sums = carry
        place, rest = x
        step = train if axis == "scan" else many
        after, upload, metrics = step(shared, _take(clients, place), _take(data, place), rest)
        if summed:
            added = upload if axis == "scan" else total(upload)
            sums, upload = jax.tree.map(jnp.add, sums, added), None
        return (_put(clients, place, after), sums), (upload, metrics)

    xs = places, per_client
    sums = None
    if summed:
        place, rest = jax.tree.map(lambda leaf: leaf[0], xs)
        shapes = jax.eval_shape(train, shared, _take(clients, place), _take(data, place), rest)[1]
        sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if axis == "scan":
        (clients, sums), (uploads, metrics) = jax.lax.scan(visit, (clients, sums), xs)
        return clients, sums if summed else uploads, metrics

    whole = count // width * width
    chunks = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, width, *leaf.shape[1:]), xs)
    carry, seen = jax.lax.scan(visit, (clients, sums), chunks)
    seen = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), seen)
    if whole < count:
        carry, last = visit(carry, jax.tree.map(lambda leaf: leaf[whole:], xs))
        seen = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), seen, last)
    (clients, sums), (uploads, metrics) = carry, seen
    return clients, sums if summed else uploads, metrics


def _sharded_sweep(mesh: Mesh) -> Callable:
    """`_sweep` with the participants split over the devices of a mesh."""
    split, everywhere = PartitionSpec(mesh.axis_names[0]), PartitionSpec()

    def sweep(train, shared, clients, data, per_client, positions, axis, summed):
        count = per_client[-1].shape[0]
        padded = -(-count // mesh.size) * mesh.size
        # Devices get equal shares: the first participant stands in again, and does not count.
        order = jnp.arange(padded, dtype=jnp.int32)
        fill = lambda tree: (
            tree if padded == count else _take(tree, jnp.where(order < count, order, 0))
        )
        rows = fill(_take(clients, positions)), fill(_take(data, positions))
        *rest, valid = fill(per_client)
        per_client = (*rest, valid & (order < count))

        def share(shared, clients, data, per_client):
            after, upload, metrics = _sweep(
                train, shared, clients, data, per_client, None, axis, summed
            )
            if summed:
                upload = jax.lax.psum(upload, mesh.axis_names[0])
            return after, upload, metrics

        after, upload, metrics = jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(everywhere, split, split, split),
            out_specs=(split, everywhere if summed else split, split),
            check_vma=False,
        )(shared, *rows, per_client)
        cut = lambda tree: jax.tree.map(lambda leaf: leaf[:count], tree)
        after, metrics = cut(after), cut(metrics)
        return _put(clients, positions, after), upload if summed else cut(upload), metrics

    return sweep

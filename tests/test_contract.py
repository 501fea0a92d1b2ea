"""What every method promises to the engine. A new method joins by one line in METHODS."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import h2tune_jax as h2


def stacked(method):
    """The same method without `reduce`: its server gets every upload."""

    def server_aggregate(specs, key, server, bases, probe, uploads, weights, ids, round_index):
        parts = []
        for spec, upload, weight in zip(specs, uploads, weights):
            each = jax.vmap(functools.partial(method.reduce, spec))(upload, weight)
            parts.append(jax.tree.map(lambda leaf: leaf.sum(axis=0), each))
        rest = weights, ids, round_index
        return method.server_aggregate(specs, key, server, bases, probe, tuple(parts), *rest)

    return method._replace(reduce=None, server_aggregate=server_aggregate)


METHODS = {
    "h2tune": lambda: h2.h2tune(learning_rate=0.02),
    "h2tune-transpose": lambda: h2.h2tune(
        learning_rate=0.02,
        upload="transpose",
        core="pure",
        selection="score",
        select_at="step",
        optimizer_state="kept",
    ),
    "h2tune-anchored": lambda: h2.h2tune(
        learning_rate=0.02, basis="anchored", core="pure", alternation="joint", relation="cka"
    ),
    "h2tune-reference": lambda: h2.h2tune(h2.REFERENCE, shared_rank=4, learning_rate=0.02),
    "fedavg": lambda: h2.fedavg(learning_rate=0.3),
    "fedavg-stacked": lambda: stacked(h2.fedavg(learning_rate=0.3)),
    "local": lambda: h2.local(learning_rate=0.02, optimizer_state="kept"),
}
ALL = np.arange(5), np.arange(3)
SOME = np.array([4, 1]), np.array([2, 0])


@functools.cache
def build(name):
    return METHODS[name]()


def specs_of(name):
    # FedAvg trains what `init_head_fn` makes, and adapts no sites.
    return toy.make_specs(**({"targets": ()} if name.startswith("fedavg") else {}))


TRACES = collections.Counter()


@functools.cache
def program(name, client_axis="scan"):
    method = build(name)

    def counting(*args):
        TRACES[name, client_axis] += 1
        return method.server_aggregate(*args)

    return h2.make_round(
        method._replace(server_aggregate=counting),
        specs_of(name),
        client_axis=client_axis,
        donate=False,
    )


@functools.cache
def evaluation(name, moment):
    return h2.make_evaluate(build(name), specs_of(name), batch_size=4, moment=moment)


@functools.cache
def started(name):
    return jax.tree.map(np.asarray, toy.stir(toy.start(build(name), specs_of(name))))


def run(name, state, *, ids=ALL, weights=None, data=None, seed=toy.SEED, axis="scan"):
    """Run one round; ids and weights are always arrays, so that one program serves many tests."""
    weights = tuple(np.ones(len(i)) for i in ids) if weights is None else weights
    out = program(name, axis)(
        state,
        toy.make_bases(),
        toy.make_data(toy.make_specs()) if data is None else data,
        tuple(np.asarray(i, np.int32) for i in ids),
        tuple(np.asarray(w, np.float32) for w in weights),
        build(name).hyper,
        seed,
    )
    return jax.tree.map(np.asarray, out)


@functools.cache
def two_rounds(name):
    """Everyone takes part in rounds 0 and 1: the states after each, and the metrics."""
    first, _ = run(name, started(name))
    second, metrics = run(name, first)
    assert metrics.rejected == {"narrow": 0, "wide": 0}
    return first, second, metrics


# A method's programs are compiled once, on the worker that has its group.
@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in METHODS],
    scope="module",
)
def name(request):
    return request.param


def test_clients_at_once_equal_clients_in_turn(name):
    # `scan` runs the method's client functions as they are written, for one client after the other.
    first, second, metrics = two_rounds(name)
    state, seen = run(name, first, axis="vmap")
    toy.assert_trees_close(state, second)
    toy.assert_trees_close(seen, metrics)


def test_state_keeps_its_structure_shapes_and_dtypes(name):
    describe = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    first, second, _ = two_rounds(name)
    assert describe(started(name)) == describe(first) == describe(second)
    # Strong types everywhere: a weak one would trace the second round anew.
    assert not any(
        leaf.weak_type for leaf in jax.tree.leaves(toy.start(build(name), specs_of(name)))
    )


def test_one_trace_serves_ten_rounds(name):
    # Fed its own output, as a user would: a weak type in it would show.
    method, specs = build(name), specs_of(name)
    state = toy.start(method, specs)
    ids = tuple(jnp.asarray(i, jnp.int32) for i in ALL)
    weights = tuple(jnp.ones(len(i)) for i in ALL)
    args = toy.make_bases(), toy.make_data(specs), ids, weights, method.hyper
    state, _ = program(name)(state, *args, toy.SEED)
    before = TRACES[name, "scan"]
    for seed in range(10):
        state, _ = program(name)(state, *args, np.uint32(seed))
    assert TRACES[name, "scan"] == before
    assert int(state.round) == 11


def test_a_resumed_run_repeats_bit_for_bit(name):
    first, second, _ = two_rounds(name)
    resumed, _ = run(name, jax.tree.map(jnp.asarray, first))
    toy.assert_trees_equal(resumed, second)


def test_the_order_of_clients_does_not_matter(name):
    first, second, metrics = two_rounds(name)
    ids = np.array([3, 0, 4, 1, 2]), np.array([2, 0, 1])
    state, seen = run(name, first, ids=ids)
    toy.assert_trees_equal(state.clients, second.clients)
    toy.assert_trees_close(state.server, second.server)
    for cohort, order in zip(("narrow", "wide"), ids):
        expected = jax.tree.map(lambda x, o=order: x[o], metrics.clients[cohort])
        toy.assert_trees_equal(seen.clients[cohort], expected)


def test_only_participants_change_and_randomness_is_their_own(name):
    first, second, _ = two_rounds(name)
    state, _ = run(name, first, ids=SOME)
    for i in range(2):
        for place in range(len(ALL[i])):
            expected = second if place in SOME[i] else first
            one = lambda tree, p=place: jax.tree.map(lambda x: x[p], tree)
            toy.assert_trees_equal(one(state.clients[i]), one(expected.clients[i]))


def test_a_client_of_weight_zero_trains_and_leaves_no_trace_on_the_server(name):
    first, second, _ = two_rounds(name)
    weights = tuple(np.isin(everyone, some) for everyone, some in zip(ALL, SOME))
    weighted, _ = run(name, first, weights=weights)
    without, _ = run(name, first, ids=SOME)
    toy.assert_trees_close(weighted.server, without.server)
    toy.assert_trees_equal(weighted.clients, second.clients)


def test_a_client_that_is_not_finite_is_refused_and_counted(name):
    first = two_rounds(name)[0]
    narrow, wide = toy.make_data(toy.make_specs())
    poisoned = narrow.examples["x"].at[2, 0, 0].set(jnp.nan)
    narrow = narrow._replace(examples={**narrow.examples, "x": poisoned})
    state, metrics = run(name, first, data=(narrow, wide))
    assert metrics.rejected == {"narrow": 1, "wide": 0}
    finite = np.array([True, True, False, True, True])
    np.testing.assert_array_equal(metrics.clients["narrow"]["finite"], finite)
    one = lambda tree: jax.tree.map(lambda x: x[2], tree)
    toy.assert_trees_equal(one(state.clients[0]), one(first.clients[0]))
    without, _ = run(name, first, weights=(finite, np.ones(3)))
    toy.assert_trees_close(state.server, without.server)


def test_a_start_does_not_depend_on_when_the_client_is_first_seen(name):
    method, specs = build(name), specs_of(name)
    later = two_rounds(name)[1]
    ids = tuple(jnp.arange(spec.num_clients, dtype=jnp.int32) for spec in specs)
    key = jax.random.key(0)
    for server in (started(name).server, later.server):
        downloads = method.broadcast(specs, key, server, ids, later.round)
        start = jax.jit(functools.partial(method.init_client, specs[0]))
        common, personal = downloads[0].common, downloads[0].personal
        one = h2.Download(common, jax.tree.map(lambda x: x[3], personal))
        client = start(key, toy.make_bases()[0], one)
        if server is started(name).server:
            expected = client
    # What a method would draw from changing values would differ here.
    static = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype != bool]
    for a, b in zip(static(client), static(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_adapters_fit_the_loss_at_both_moments(name):
    specs = specs_of(name)
    state = two_rounds(name)[1]
    for moment in ("trained", "downloaded"):
        evaluate = evaluation(name, moment)
        results = evaluate(state, toy.make_bases(), toy.make_data(specs))
        for spec in specs:
            assert results[spec.name]["loss"].shape == (spec.num_clients,)
            assert np.isfinite(results[spec.name]["loss"]).all()


def test_training_lowers_the_loss(name):
    specs = specs_of(name)
    state = toy.start(build(name), specs_of(name))
    evaluate = lambda state: evaluation(name, "trained")(
        state, toy.make_bases(), toy.make_data(specs)
    )
    before = evaluate(state)
    for _ in range(8):
        state, _ = run(name, state)
    after = evaluate(state)
    for spec in specs:
        assert after[spec.name]["loss"].mean() < 0.9 * before[spec.name]["loss"].mean()

"""What every method promises to the engine. A new method joins by one line in METHODS."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import h2tune_jax as h2

METHODS = {
    "h2tune": lambda: h2.h2tune(learning_rate=0.02),
    "h2tune-transpose": lambda: h2.h2tune(learning_rate=0.02, upload="transpose", core="pure"),
    "h2tune-kept": lambda: h2.h2tune(
        learning_rate=0.02, optimizer_state="kept", selection="score", select_at="step"
    ),
    "h2tune-seeded": lambda: h2.h2tune(learning_rate=0.02, basis="seeded", alternation="joint"),
    "h2tune-cka": lambda: h2.h2tune(
        learning_rate=0.02, relation="cka", selection="magnitude", alternation="jacobi"
    ),
    "h2tune-reference": lambda: h2.h2tune(h2.REFERENCE, shared_rank=4, learning_rate=0.02),
    "fedavg": lambda: h2.fedavg(learning_rate=0.3),
    "local": lambda: h2.local(learning_rate=0.02, optimizer_state="kept"),
}


@functools.cache
def build(name):
    return METHODS[name]()


TRACES = collections.Counter()


@functools.cache
def program(name, client_axis="scan"):
    method = build(name)

    def counting(*args):
        TRACES[name, client_axis] += 1
        return method.server_aggregate(*args)

    return h2.make_round(
        method._replace(server_aggregate=counting),
        toy.make_specs(),
        client_axis=client_axis,
        donate=False,
    )


@functools.cache
def started(name):
    return toy.stir(toy.start(build(name)))


def run(name, state, *, ids=toy.EVERYONE, weights=toy.EVERYONE, seed=toy.SEED, axis="scan"):
    specs = toy.make_specs()
    method = build(name)
    return program(name, axis)(
        state, toy.make_bases(), toy.make_data(specs), ids, weights, method.hyper, seed
    )


@functools.cache
def two_rounds(name):
    """Everyone takes part in rounds 0 and 1: the states after each, and the metrics."""
    first, _ = run(name, started(name))
    second, metrics = run(name, first)
    return first, second, metrics


# A method's programs are compiled once, on the worker that has its group.
@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in METHODS],
    scope="module",
)
def name(request):
    return request.param


@pytest.mark.parametrize("axis", ["vmap", 2])
def test_every_client_axis_gives_the_same_round(name, axis):
    # `scan` runs the method's client functions as they are written, for one client after the other.
    first, second, metrics = two_rounds(name)
    state, seen = run(name, first, axis=axis)
    toy.assert_trees_close(state, second)
    toy.assert_trees_close(seen, metrics)


def test_state_keeps_its_structure_shapes_and_dtypes(name):
    # Strong types everywhere: a weak one would trace the second round anew.
    describe = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    fresh = toy.start(build(name))
    assert describe(fresh) == describe(two_rounds(name)[0]) == describe(two_rounds(name)[1])


def test_one_trace_serves_ten_rounds(name):
    state, _, _ = two_rounds(name)
    before = TRACES[name, "scan"]
    for seed in range(10):
        state, _ = run(name, state, seed=np.uint32(seed))
    assert TRACES[name, "scan"] == before
    assert int(state.round) == 11


def test_a_resumed_run_repeats_bit_for_bit(name):
    first, second, _ = two_rounds(name)
    stored = jax.tree.map(np.asarray, first)
    resumed, _ = run(name, jax.tree.map(jnp.asarray, stored))
    toy.assert_trees_equal(resumed, second)


def test_the_order_of_clients_does_not_matter(name):
    _, second, metrics = two_rounds(name)
    ids = jnp.array([3, 0, 4, 1, 2]), jnp.array([2, 0, 1])
    state, seen = run(name, two_rounds(name)[0], ids=ids)
    toy.assert_trees_equal(state.clients, second.clients)
    toy.assert_trees_close(state.server, second.server)
    for cohort, order in zip(("narrow", "wide"), ids):
        expected = jax.tree.map(lambda x, o=order: x[o], metrics.clients[cohort])
        toy.assert_trees_equal(seen.clients[cohort], expected)


def test_only_participants_change_and_randomness_is_their_own(name):
    first, second, _ = two_rounds(name)
    ids = jnp.array([4, 1]), jnp.array([], jnp.int32)
    state, _ = run(name, first, ids=ids)
    took_part = np.array([1, 4])
    for place in range(5):
        expected = second if place in took_part else first
        toy.assert_trees_equal(
            jax.tree.map(lambda x, p=place: x[p], state.clients[0]),
            jax.tree.map(lambda x, p=place: x[p], expected.clients[0]),
        )
    toy.assert_trees_equal(state.clients[1], first.clients[1])


def test_a_client_of_weight_zero_trains_and_leaves_no_trace_on_the_server(name):
    first, second, _ = two_rounds(name)
    weights = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 1.0])
    weighted, _ = run(name, first, weights=weights)
    without, _ = run(name, first, ids=(jnp.array([0, 2, 3]), jnp.array([1, 2])))
    toy.assert_trees_close(weighted.server, without.server)
    toy.assert_trees_equal(weighted.clients, second.clients)


def test_a_client_that_is_not_finite_is_refused_and_counted(name):
    first = two_rounds(name)[0]
    specs = toy.make_specs()
    data = toy.make_data(specs)
    poisoned = data[0].examples["x"].at[2, 0, 0].set(jnp.nan)
    data = (data[0]._replace(examples={**data[0].examples, "x": poisoned}), data[1])
    method = build(name)
    args = toy.EVERYONE, (jnp.ones(5), jnp.ones(3)), method.hyper, toy.SEED
    state, metrics = program(name)(first, toy.make_bases(), data, *args)
    assert int(metrics.rejected["narrow"]) == 1
    assert int(metrics.rejected["wide"]) == 0
    np.testing.assert_array_equal(
        metrics.clients["narrow"]["finite"], [True, True, False, True, True]
    )
    one = lambda tree: jax.tree.map(lambda x: x[2], tree)
    toy.assert_trees_equal(one(state.clients[0]), one(first.clients[0]))
    without, _ = run(name, first, weights=(jnp.array([1.0, 1.0, 0.0, 1.0, 1.0]), jnp.ones(3)))
    toy.assert_trees_close(state.server, without.server)


def test_a_start_does_not_depend_on_when_the_client_is_first_seen(name):
    method, specs = build(name), toy.make_specs()
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
    method, specs = build(name), toy.make_specs()
    state = two_rounds(name)[1]
    data = toy.make_data(specs)
    for moment in ("trained", "downloaded"):
        evaluate = h2.make_evaluate(method, specs, batch_size=4, moment=moment)
        results = evaluate(state, toy.make_bases(), data)
        for spec in specs:
            assert results[spec.name]["loss"].shape == (spec.num_clients,)
            assert np.isfinite(results[spec.name]["loss"]).all()


def test_training_lowers_the_loss(name):
    method, specs = build(name), toy.make_specs()
    data = toy.make_data(specs)
    evaluate = h2.make_evaluate(method, specs, batch_size=10)
    state = toy.start(method)
    before = evaluate(state, toy.make_bases(), data)
    args = toy.EVERYONE, toy.EVERYONE, method.hyper, toy.SEED
    for _ in range(8):
        state, _ = program(name)(state, toy.make_bases(), data, *args)
    after = evaluate(state, toy.make_bases(), data)
    for spec in specs:
        assert after[spec.name]["loss"].mean() < 0.9 * before[spec.name]["loss"].mean()

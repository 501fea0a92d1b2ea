"""The engine: participation, steps, devices, memory, and rounds inside other transformations."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import h2tune_jax as h2

METHOD = h2.h2tune(learning_rate=0.02)
# Half the compile time, where the alternation is not what is tested.
JOINT = h2.h2tune(learning_rate=0.02, alternation="joint")


def arguments(method, specs=None, ids=toy.EVERYONE, weights=toy.EVERYONE):
    specs = toy.make_specs() if specs is None else specs
    return toy.make_bases(), toy.make_data(specs), ids, weights, method.hyper


def test_clients_take_as_many_steps_as_they_have_batches():
    specs = toy.make_specs(budget=h2.Budget(batch_size=4, epochs=2))
    round_fn = h2.make_round(JOINT, specs)
    _, metrics = round_fn(toy.start(JOINT, specs), *arguments(JOINT, specs), toy.SEED)
    # 10, 9, 8, 7, 6 and 10, 9, 8 examples in batches of 4, twice.
    np.testing.assert_array_equal(metrics.clients["narrow"]["steps"], [6, 6, 4, 4, 4])
    np.testing.assert_array_equal(metrics.clients["wide"]["steps"], [6, 6, 4])


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_beyond_a_clients_examples_do_not_matter(shuffle):
    specs = toy.make_specs(budget=h2.Budget(batch_size=4, steps=5, shuffle=shuffle))
    round_fn = h2.make_round(JOINT, specs, donate=False)
    state = toy.start(JOINT, specs)
    bases, data, *rest = arguments(JOINT, specs)

    def spoil(rows):
        beyond = jnp.arange(10)[None, :] >= rows.num_examples[:, None]
        x = jnp.where(beyond[..., None], -7.0, rows.examples["x"])
        y = jnp.where(beyond, 0, rows.examples["y"])
        return rows._replace(examples={"x": x, "y": y})

    one, seen = round_fn(state, bases, data, *rest, toy.SEED)
    other, _ = round_fn(state, bases, tuple(spoil(rows) for rows in data), *rest, toy.SEED)
    toy.assert_trees_equal(one, other)
    np.testing.assert_array_equal(seen.clients["narrow"]["steps"], 5)


def test_chunks_with_a_remainder_equal_clients_in_turn():
    specs = toy.make_specs()
    state, args = toy.stir(toy.start(JOINT)), (*arguments(JOINT), toy.SEED)
    expected = h2.make_round(JOINT, specs, client_axis="scan", donate=False)(state, *args)
    chunks = h2.make_round(JOINT, specs, client_axis=2, donate=False)(state, *args)
    toy.assert_trees_close(chunks, expected)


@pytest.mark.slow
def test_rounds_scan_and_runs_map_over_seeds_and_rates():
    # Plain SGD: Adam would blow the rounding of a batched product up to its own scale.
    method = h2.h2tune(learning_rate=0.02, optimizer=optax.identity())
    specs = toy.make_specs()
    bases, data, ids, weights, hyper = arguments(method)
    round_fn = h2.make_round(method, specs, donate=False)

    def run(seed, rate):
        state = h2.init_round(method, specs, bases, None, jax.random.key(seed))
        settings = hyper._replace(learning_rate=rate, shared_rate=2 * rate)
        step = lambda state, _: round_fn(state, bases, data, ids, weights, settings, seed)
        return jax.lax.scan(step, state, length=3)

    seeds, rates = jnp.array([1, 2], jnp.uint32), jnp.array([0.01, 0.03])
    grid = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(seeds, rates)
    for i, seed in enumerate(seeds):
        for j, rate in enumerate(rates):
            state = h2.init_round(method, specs, bases, None, jax.random.key(seed))
            settings = hyper._replace(learning_rate=rate, shared_rate=2 * rate)
            for k in range(3):
                state, metrics = round_fn(state, bases, data, ids, weights, settings, seed)
                here = jax.tree.map(lambda x, at=(i, j, k): x[at], grid[1])
                toy.assert_trees_close(here, metrics, rtol=1e-4, atol=1e-5)
            last = jax.tree.map(lambda x, at=(i, j): x[at], grid[0])
            toy.assert_trees_close(last.server, state.server, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("client_axis", "sampled"),
    [
        ("vmap", True),
        pytest.param("scan", False, marks=pytest.mark.slow),
        pytest.param("scan", True, marks=pytest.mark.slow),
        pytest.param("vmap", False, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_same_rounds_as_one(cpu_devices, client_axis, sampled):
    specs = toy.make_specs()
    ids = (jnp.array([4, 0, 2]), jnp.array([1])) if sampled else toy.EVERYONE
    weights = (jnp.array([1.0, 3.0, 0.5]), jnp.array([2.0])) if sampled else toy.EVERYONE
    args = arguments(JOINT, ids=ids, weights=weights)
    mesh = jax.make_mesh(
        (8,), ("clients",), devices=cpu_devices, axis_types=(jax.sharding.AxisType.Auto,)
    )
    alone = h2.make_round(JOINT, specs, client_axis=client_axis)
    together = h2.make_round(JOINT, specs, client_axis=client_axis, mesh=mesh)
    expected, state = toy.start(JOINT), toy.start(JOINT)
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    text = together.lower(state, *args, toy.SEED).compile().as_text()
    assert "all-reduce" in text  # the uploads were summed across devices
    assert "num_partitions=8" in text
    for _ in range(3):  # what a round gives has to be good for the next
        expected, metrics = alone(expected, *args, toy.SEED)
        state, seen = together(state, *args, toy.SEED)
    host = lambda tree: jax.tree.map(np.asarray, tree)
    toy.assert_trees_close(host(state), host(expected), rtol=1e-3, atol=1e-4)
    toy.assert_trees_close(host(seen), host(metrics), rtol=1e-3, atol=1e-4)


def rows_of(trees, ids):
    return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for tree, i in zip(trees, ids))


def in_both_ways(ids):
    """Run a round on whole cohorts, and on the participants' rows: -> their results, and these rows."""
    specs, state = toy.make_specs(), toy.stir(toy.start(JOINT))
    bases, data, _, weights, hyper = arguments(JOINT)
    rest = ids, weights, hyper, toy.SEED
    whole = h2.make_round(JOINT, specs, donate=False)(state, bases, data, *rest)
    rows = state._replace(clients=rows_of(state.clients, ids))
    round_fn = h2.make_round(JOINT, specs, resident=False, donate=False)
    return whole, round_fn(rows, bases, rows_of(data, ids), *rest), rows


def test_rows_of_participants_give_the_same_round_as_the_whole_cohort():
    ids = jnp.array([4, 1]), jnp.array([2, 0])
    (whole, seen), (part, seen_part), _ = in_both_ways(ids)
    toy.assert_trees_equal(part.clients, rows_of(whole.clients, ids))
    toy.assert_trees_equal(part.server, whole.server)
    toy.assert_trees_equal(seen_part, seen)


def test_rows_of_nobody_and_of_the_same_client_again_change_nothing():
    (whole, seen), (part, seen_part), rows = in_both_ways((jnp.array([4, 4, 9]), jnp.array([2, 0])))
    toy.assert_trees_equal(part.server, whole.server)
    assert seen_part.rejected == seen.rejected == {"narrow": 2, "wide": 0}
    after, before = (jax.tree.map(lambda x: x[1:], s.clients[0]) for s in (part, rows))
    toy.assert_trees_equal(after, before)


def wide_federation(num_clients):
    """One cohort whose base outweighs everything else that a client needs."""
    spec = toy.cohort(
        "wide", width=256, depth=4, rank=2, kinds=("q",), classes=2, num_clients=num_clients
    )
    specs = (spec,)
    base = toy.init_base(0, 256, 4, ("q",))
    rng = np.random.default_rng(0)
    examples = {
        "x": jnp.asarray(rng.normal(size=(num_clients, 4, toy.INPUT)), jnp.float32),
        "y": jnp.zeros((num_clients, 4), jnp.int32),
    }
    data = h2.ClientData(examples, jnp.full(num_clients, 4, jnp.int32))
    state = h2.init_round(JOINT, specs, (base,), None, jax.random.key(0))
    return specs, state, ((base,), (data,), (None,), (None,), JOINT.hyper)


@pytest.mark.parametrize("client_axis", ["scan", "vmap"])
def test_the_frozen_base_is_never_copied_per_client(client_axis):
    specs, state, args = wide_federation(16)
    round_fn = h2.make_round(JOINT, specs, client_axis=client_axis)
    memory = round_fn.lower(state, *args, toy.SEED).compile().memory_analysis()
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    base, clients = size(args[0]), size(state.clients)
    assert base > 1_000_000
    # Sixteen bases would be 16 MB. What is left is personal: state, gradients, moments.
    assert memory.temp_size_in_bytes < base + 6 * clients


def test_buffers_are_donated():
    specs, state, args = wide_federation(16)
    round_fn = h2.make_round(JOINT, specs)
    memory = round_fn.lower(state, *args, toy.SEED).compile().memory_analysis()
    personal = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.clients))
    assert memory.alias_size_in_bytes >= personal
    factors = state.clients[0].a["q"]
    round_fn(state, *args, toy.SEED)
    assert factors.is_deleted()


def test_a_round_moves_nothing_between_host_and_device():
    specs = toy.make_specs()
    round_fn = h2.make_round(METHOD, specs)
    args = (*arguments(METHOD), jnp.uint32(3))
    compiled = round_fn.lower(toy.start(METHOD), *args).compile()
    assert not re.search(r"callback|infeed|outfeed|host-transfer", compiled.as_text())
    state = toy.start(METHOD)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, _ = round_fn(state, *args)
    assert int(state.round) == 2


def test_a_new_seed_or_round_reorders_the_examples():
    specs = toy.make_specs()
    round_fn = h2.make_round(JOINT, specs, donate=False)
    state = toy.start(JOINT)
    args = arguments(JOINT)
    loss = lambda state, seed: np.asarray(
        round_fn(state, *args, np.uint32(seed))[1].clients["narrow"]["loss"]
    )
    assert (loss(state, 1) != loss(state, 2)).all()
    later = state._replace(round=state.round + 1)
    assert (loss(state, 1) != loss(later, 1)).any()
    np.testing.assert_array_equal(loss(state, 1), loss(state, 1))


def test_the_order_of_cohorts_changes_no_clients_randomness():
    specs = toy.make_specs()
    state = toy.start(h2.local())
    reverse = lambda pair: pair[::-1]
    backwards = h2.init_round(
        h2.local(), reverse(specs), reverse(toy.make_bases()), None, jax.random.key(11)
    )
    toy.assert_trees_equal(reverse(backwards.clients), state.clients)


def test_dropout_is_drawn_in_training_and_absent_from_evaluation():
    data = toy.make_data(toy.make_specs())
    losses = {}
    for rate in (0.0, 0.5):
        specs = toy.make_specs(dropout=rate)
        state = toy.stir(toy.start(JOINT, specs))
        evaluate = h2.make_evaluate(JOINT, specs, batch_size=4)
        losses[rate] = evaluate(state, toy.make_bases(), data)["narrow"]["loss"]
        round_fn = h2.make_round(JOINT, specs)
        _, metrics = round_fn(state, *arguments(JOINT, specs), toy.SEED)
        losses["train", rate] = metrics.clients["narrow"]["loss"]
    np.testing.assert_array_equal(losses[0.0], losses[0.5])
    assert (np.asarray(losses["train", 0.0]) != np.asarray(losses["train", 0.5])).all()


def test_budget_may_differ_between_cohorts():
    narrow, wide = toy.make_specs()
    wide = dataclasses.replace(wide, budget=h2.Budget(batch_size=2, steps=3))
    specs = (narrow, wide)
    _, metrics = h2.make_round(JOINT, specs)(
        toy.start(JOINT, specs), *arguments(JOINT, specs), toy.SEED
    )
    np.testing.assert_array_equal(metrics.clients["wide"]["steps"], [3, 3, 3])


@pytest.mark.parametrize("client_axis", ["scan", "vmap", 2])
@pytest.mark.parametrize(
    ("ids", "good"), [([1, 7], [1]), ([1, -1], [1]), ([1, 1], [1]), ([9, 3], [3])]
)
def test_ids_that_name_nobody_or_somebody_again_are_refused(client_axis, ids, good):
    method, specs = h2.local(learning_rate=0.02), toy.make_specs()
    round_fn = h2.make_round(method, specs, client_axis=client_axis, donate=False)
    bases, data, *_ = arguments(method)
    state = toy.start(method)
    nobody = jnp.zeros(0, jnp.int32)
    after, metrics = round_fn(
        state, bases, data, (jnp.array(ids), nobody), None, method.hyper, toy.SEED
    )
    expected, _ = round_fn(
        state, bases, data, (jnp.array(good), nobody), None, method.hyper, toy.SEED
    )
    toy.assert_trees_close(after.clients, expected.clients)
    assert {name: int(count) for name, count in metrics.rejected.items()} == {
        "narrow": 1,
        "wide": 0,
    }
    np.testing.assert_array_equal(
        metrics.clients["narrow"]["finite"],
        [i in good and n == ids.index(i) for n, i in enumerate(ids)],
    )
    assert metrics.clients["wide"] == {}


def test_a_client_without_examples_does_not_dilute():
    method, specs = h2.fedavg(learning_rate=0.3), toy.make_specs(targets=())
    round_fn = h2.make_round(method, specs, donate=False)
    state = toy.start(method, specs)
    bases, data, *_ = arguments(method)
    only = data[0]._replace(num_examples=jnp.array([10, 0, 0, 0, 0], jnp.int32))
    args = None, method.hyper, toy.SEED
    nobody = jnp.zeros(0, jnp.int32)
    diluted, seen = round_fn(state, bases, (only, data[1]), (None, nobody), *args)
    alone, _ = round_fn(state, bases, data, (jnp.array([0]), nobody), *args)
    toy.assert_trees_close(diluted.server, alone.server)
    np.testing.assert_array_equal(seen.clients["narrow"]["steps"], [3, 0, 0, 0, 0])
    assert int(seen.rejected["narrow"]) == 0


def test_a_weight_that_is_not_finite_does_not_count():
    method, specs = h2.fedavg(), toy.make_specs(targets=())
    round_fn = h2.make_round(method, specs, donate=False)
    state = toy.start(method, specs)
    args = arguments(method)[:3]
    rest = method.hyper, toy.SEED
    for bad in (jnp.inf, jnp.nan, -1.0):
        weights = jnp.array([1.0, bad, 1.0, 1.0, 1.0]), jnp.ones(3)
        after, _ = round_fn(state, *args, weights, *rest)
        without, _ = round_fn(state, *args, (weights[0].at[1].set(0.0), weights[1]), *rest)
        toy.assert_trees_equal(after.server, without.server)


def test_more_examples_than_rows_are_no_more_than_rows():
    method, specs = h2.local(learning_rate=0.02), toy.make_specs()
    round_fn = h2.make_round(method, specs, donate=False)
    evaluate = h2.make_evaluate(method, specs, batch_size=4)
    bases, data, *rest = arguments(method)
    full = tuple(rows._replace(num_examples=jnp.full_like(rows.num_examples, 10)) for rows in data)
    over = tuple(rows._replace(num_examples=jnp.full_like(rows.num_examples, 99)) for rows in data)
    state = toy.start(method)
    toy.assert_trees_equal(
        round_fn(state, bases, over, *rest, toy.SEED), round_fn(state, bases, full, *rest, toy.SEED)
    )
    toy.assert_trees_equal(evaluate(state, bases, over), evaluate(state, bases, full))


def test_a_gradient_that_is_not_finite_behind_a_finite_loss_is_refused():
    def treacherous(adapters, base, batch, key):
        loss, metrics = toy.loss_fn(adapters, base, batch, key)
        # Its value is 0 everywhere, its derivative infinite where x is spoilt.
        root = jnp.sqrt(
            jnp.where(batch.examples["x"].max() > 9e3, 0.0, 1.0) * adapters.head[0, 0] ** 2
        )
        return loss + 0.0 * root, metrics

    narrow, wide = toy.make_specs()
    specs = (dataclasses.replace(narrow, loss_fn=treacherous), wide)
    bases, data, *rest = arguments(JOINT)
    spoilt = data[0].examples["x"].at[2, 0, 0].set(1e4)
    data = (data[0]._replace(examples={**data[0].examples, "x": spoilt}), data[1])
    state = toy.start(JOINT, specs)
    after, metrics = h2.make_round(JOINT, specs, donate=False)(state, bases, data, *rest, toy.SEED)
    np.testing.assert_array_equal(
        metrics.clients["narrow"]["finite"], [True, True, False, True, True]
    )
    one = lambda tree: jax.tree.map(lambda x: x[2], tree)
    toy.assert_trees_equal(one(after.clients[0]), one(state.clients[0]))
    assert np.isfinite(after.server.middle).all()


def test_whole_numbers_as_rates_do_not_round_a_schedule():
    method = h2.local(schedule=h2.cosine_schedule(), optimizer=optax.identity())
    specs = toy.make_specs()
    bases, data, ids, weights, hyper = arguments(method)
    round_fn = h2.make_round(method, specs, donate=False)
    state = toy.start(method)
    given = [hyper._replace(head_rate=rate) for rate in (1, 1.0, jnp.float32(1.0))]
    results = [round_fn(state, bases, data, ids, weights, h, toy.SEED)[0] for h in given]
    toy.assert_trees_equal(results[0], results[1])
    toy.assert_trees_equal(results[0], results[2])


def test_the_warm_start_stays_a_branch_under_vmap_over_seeds():
    specs = toy.make_specs()
    bases, data, ids, weights, hyper = arguments(METHOD)
    round_fn = h2.make_round(METHOD, specs, client_axis="vmap", donate=False)
    states = jax.vmap(lambda key: h2.init_round(METHOD, specs, bases, None, key))(
        jax.random.split(jax.random.key(0), 2)
    )
    states = states._replace(round=jnp.int32(0))
    axes = h2.RoundState(None, 0, 0)
    many = jax.vmap(
        lambda state: round_fn(state, bases, data, ids, weights, hyper, toy.SEED),
        in_axes=(axes,),
        out_axes=(axes, 0),
    )
    assert jax.jit(many).lower(states).as_text().count("stablehlo.case") == len(specs)


@pytest.mark.parametrize(
    "method",
    [
        h2.local(optimizer=optax.identity()),
        pytest.param(h2.h2tune(optimizer=optax.identity()), marks=pytest.mark.slow),
    ],
)
def test_a_cohort_has_its_own_rate_for_the_head(method):
    specs = toy.make_specs(budget=h2.Budget(batch_size=4, steps=1))
    quick = dataclasses.replace(specs[0], head_rate_factor=3.0), specs[1]
    state = toy.start(method, specs)
    moved = []
    for federation in (specs, quick):
        round_fn = h2.make_round(method, federation, donate=False)
        after, _ = round_fn(state, *arguments(method, federation), toy.SEED)
        head = lambda s, i: (
            s.clients[i].head if method.name == "h2tune" else s.clients[i].params["head"]
        )
        moved.append([np.asarray(head(after, i) - head(state, i)) for i in (0, 1)])
    np.testing.assert_allclose(moved[1][0], 3 * moved[0][0], rtol=2e-3, atol=1e-7)
    np.testing.assert_array_equal(moved[1][1], moved[0][1])

"""What every method promises to the engine. A new method joins in `support/contract_rows.py`."""

import functools
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from contract import ALL, NAMES, NOBODY, SOME, Case, inputs, usual_starts
from contract_rows import METHODS, row_of, specs_of

import h2tune_jax as h2
from h2tune_jax.aggregate import architecture

# What is made of the same parts as a method that is not slow: FedIT, Fed-HeLLo.
ALIKE = ("ffa_lora", "fedsa_lora", "fedra")
FEW = ("h2tune", "local", "fedavg", "fedit", "fed_hello", "co_lora")


def params(fast=METHODS):
    """All methods; further forms of one are slow, and so is what is not among the fast."""
    found = []
    for name in METHODS:
        is_slow = "-" in name or name in ALIKE or name not in fast
        # A method's programs are compiled once, on the worker that has its group.
        marks = [pytest.mark.xdist_group(name)] + [pytest.mark.slow] * is_slow
        found.append(pytest.param(name, marks=marks))
    return found


@pytest.fixture(params=params(), scope="module")
def case(request):
    case = Case(request.param, METHODS[request.param](), specs_of(request.param))
    yield case
    # The programs of all methods together need more memory maps than a process may have.
    vars(case).clear()
    jax.clear_caches()
    gc.collect()


@pytest.mark.parametrize("case", params(fast=FEW), indirect=True)
def test_clients_at_once_equal_clients_in_turn(case):
    # `scan` runs the method's client functions as they are written, for one client after the other.
    # Of the cohort of most layers and the largest rank: a second program of all takes long to compile.
    together = case.run(case.two_rounds[0], ids=SOME, axis="vmap")
    toy.assert_trees_close(together, case.some_again)


def test_state_keeps_its_structure_shapes_and_dtypes(case):
    describe = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
    first, second, _ = case.two_rounds
    assert describe(case.started) == describe(first) == describe(second)
    # Strong types everywhere: a weak one would trace the second round anew.
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(case.fresh))


def test_one_trace_serves_ten_rounds(case):
    # Fed its own output, as a user would: a weak type in it would show.
    bases, data, _ = inputs()
    ids = tuple(jnp.asarray(i, jnp.int32) for i in ALL)
    weights = tuple(jnp.ones(len(i)) for i in ALL)
    args = bases, data, ids, weights, case.method.hyper
    state, _ = case.round_fn()(case.fresh, *args, toy.SEED)
    before = case.traces
    for seed in range(10):
        state, _ = case.round_fn()(state, *args, np.uint32(seed))
    assert case.traces == before
    assert int(state.round) == 11


def test_a_resumed_run_repeats_bit_for_bit(case):
    first, second, _ = case.two_rounds
    resumed, _ = case.run(jax.tree.map(jnp.asarray, first))
    toy.assert_trees_equal(resumed, second)


def test_the_order_of_clients_does_not_matter(case):
    first, second, metrics = case.two_rounds
    ids = np.array([3, 0, 4, 1, 2]), np.array([2, 0, 1]), np.array([1, 0])
    state, seen = case.run(first, ids=ids)
    toy.assert_trees_equal(state.clients, second.clients)
    toy.assert_trees_close(state.server, second.server)
    for cohort, order in zip(NAMES, ids):
        expected = jax.tree.map(lambda x, o=order: x[o], metrics.clients[cohort])
        toy.assert_trees_equal(seen.clients[cohort], expected)


def test_only_participants_change_and_randomness_is_their_own(case):
    first, second, _ = case.two_rounds
    state, metrics = case.some_again
    for i, everyone in enumerate(ALL):
        for place in everyone:
            expected = second if place in SOME[i] else first
            one = lambda tree, p=place: jax.tree.map(lambda x: x[p], tree)
            toy.assert_trees_equal(one(state.clients[i]), one(expected.clients[i]))
    assert metrics.clients["narrow"] == metrics.clients["again"] == {}


def test_a_client_of_weight_zero_trains_and_leaves_no_trace_on_the_server(case):
    # Cohorts in which nobody counts are as if they had been left out.
    first, second, _ = case.two_rounds
    weights = tuple(np.isin(everyone, some) for everyone, some in zip(ALL, SOME))
    weighted, _ = case.run(first, weights=weights)
    toy.assert_trees_close(weighted.server, case.some_again[0].server)
    toy.assert_trees_equal(weighted.clients, second.clients)


def test_a_round_of_nobody_leaves_all_as_it_was(case):
    first = case.two_rounds[0]
    state, metrics = case.run(first, ids=NOBODY)
    assert state.round == first.round + 1
    assert metrics.clients == {cohort: {} for cohort in NAMES}
    toy.assert_trees_equal(state.clients, first.clients)
    toy.assert_trees_close(state.server, first.server)


def test_a_client_that_is_not_finite_is_refused_and_counted(case):
    first = case.two_rounds[0]
    narrow, *others = inputs()[1]
    poisoned = narrow.examples["x"].copy()
    poisoned[2, 0, 0] = np.nan
    narrow = narrow._replace(examples={**narrow.examples, "x": poisoned})
    state, metrics = case.run(first, data=(narrow, *others))
    assert metrics.rejected == {"narrow": 1, "wide": 0, "again": 0}
    finite = np.array([True, True, False, True, True])
    np.testing.assert_array_equal(metrics.clients["narrow"]["finite"], finite)
    one = lambda tree: jax.tree.map(lambda x: x[2], tree)
    toy.assert_trees_equal(one(state.clients[0]), one(first.clients[0]))
    without, _ = case.run(first, weights=(finite, np.ones(3), np.ones(2)))
    toy.assert_trees_close(state.server, without.server)


def test_a_start_does_not_depend_on_when_the_client_is_first_seen(case):
    later = case.two_rounds[1]
    start = jax.jit(functools.partial(case.method.init_client, case.specs[0]))
    clients = []
    for server in (case.started.server, later.server):
        common, personal = case.broadcast(server, later.round)[0]
        one = h2.Download(common, jax.tree.map(lambda x: x[3], personal))
        clients.append(start(jax.random.key(0), inputs()[0][0], one))
    # What a method would draw from changing values would differ here.
    static = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype != bool]
    for a, b in zip(*map(static, clients), strict=True):
        np.testing.assert_array_equal(a, b)


def test_clients_start_as_they_do_in_every_other_method(case):
    starts = row_of(case.name).starts
    if not starts:  # what the server starts
        assert not jax.tree.leaves(case.fresh.clients)
        return
    clients, common = usual_starts(row_of(case.name).mixed)
    look = case.models(lambda _, adapters: adapters, downloaded=False)
    for spec, adapters, usual in zip(case.specs, look(case.fresh), clients):
        np.testing.assert_array_equal(adapters.head, usual.params["head"])
        for kind, site in adapters.sites.items():
            if "a" in starts:
                np.testing.assert_array_equal(site.a, usual.params["a"][kind])
            if "common a" in starts:
                a = common[architecture(spec)]["a"][kind]
                np.testing.assert_array_equal(site.a, np.broadcast_to(a, site.a.shape))


def test_the_adapters_fit_the_loss_at_both_moments(case):
    for moment in ("trained", "downloaded"):
        results = case.evaluate(case.two_rounds[1], moment)
        for spec in case.specs:
            assert results[spec.name]["loss"].shape == (spec.num_clients,)
            assert np.isfinite(results[spec.name]["loss"]).all()


def test_training_lowers_the_loss(case):
    state = case.fresh
    before = case.evaluate(state)
    for _ in range(8):
        state, _ = case.run(state)
    after = case.evaluate(state)
    for cohort in NAMES:
        assert after[cohort]["loss"].mean() < 0.9 * before[cohort]["loss"].mean()


def test_what_is_shared_changes_and_agrees_between_clients(case):
    third, metrics = case.run(case.two_rounds[1])
    assert metrics.rejected == dict.fromkeys(NAMES, 0)
    differs = lambda one, other: any(
        (a != b).any() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))
    )
    if row_of(case.name).agrees is None:
        changed = differs(case.started.server, third.server)
        assert changed == (case.method.shared is not None)
        return
    look = case.models(row_of(case.name).agrees, downloaded=True)
    for old, new in zip(look(case.started), look(third)):
        for client in range(len(jax.tree.leaves(new)[0])):
            one = lambda tree, i=client: jax.tree.map(lambda leaf: leaf[i], tree)
            assert differs(one(old), one(new))
        toy.assert_trees_equal(new, jax.tree.map(lambda leaf: leaf[:1].repeat(len(leaf), 0), new))


def test_nothing_else_leaves_a_client(case):
    method, row, state = case.method, row_of(case.name), case.two_rounds[1]
    one = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    bases, all_data, _ = inputs()
    downloads = case.broadcast(state.server, state.round)
    args = zip(case.specs, bases, state.clients, downloads, all_data)
    for spec, base, clients, (common, personal), data in args:
        given = one(clients), h2.Download(common, one(personal)), h2.ClientData(*one(data))
        update = functools.partial(method.client_update, spec, jax.random.key(0), base)
        _, upload, metrics = jax.eval_shape(update, *given, method.hyper, state.round)
        leaves = [leaf for leaf in jax.tree.leaves(upload) if leaf.dtype != bool]
        assert sorted(leaf.shape for leaf in leaves) == sorted(row.upload(spec))
        for way in ("up", "down"):
            assert metrics[f"numbers_{way}"].shape == metrics[f"bytes_{way}"].shape == ()
        seen = jax.tree.map(np.asarray, case.two_rounds[2].clients[spec.name])
        size = sum(leaf.size for leaf in leaves)
        heavy = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        for name, most in {"numbers_up": size, "bytes_up": heavy}.items():
            low = most if row.whole else 1
            assert (seen[name] >= low).all()
            assert (seen[name] <= most).all()
        down = sum(math.prod(shape) for shape in (row.down or row.upload)(spec))
        assert not row.counts_down or (seen["numbers_down"] == down).all()
        assert (seen["bytes_down"] == 4 * seen["numbers_down"]).all()  # all are f32 or i32

    # With rates of zero an upload can only depend on what a client held before.
    def stir(path, leaf):
        private = any(part in jax.tree_util.keystr(path) for part in row.private)
        return leaf + np.asarray(0.1, leaf.dtype) if private else leaf

    changed = state._replace(clients=jax.tree_util.tree_map_with_path(stir, state.clients))
    assert not row.private or any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(changed.clients), jax.tree.leaves(state.clients))
    )
    still = jax.tree.map(jnp.zeros_like, method.hyper)
    left = []
    for each in (state, changed):
        leaves = jax.tree_util.tree_leaves_with_path(case.run(each, hyper=still)[0].server)
        paths = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
        left.append({p: leaf for p, leaf in paths.items() if not any(s in p for s in row.save)})
    assert left[0] or method.shared is None
    toy.assert_trees_equal(*left)

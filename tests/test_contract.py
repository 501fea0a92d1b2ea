"""What every method promises to the engine. A new method joins by one line in METHODS."""

import collections
import dataclasses
import functools
import gc
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.adapters import beside


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
    "ce_lora": lambda: h2.ce_lora(learning_rate=0.02),
    "fedra": lambda: h2.fedra(learning_rate=0.02),
    "fed_hello": lambda: h2.fed_hello(
        learning_rate=0.02,
        allocation="combined",
        heads="shared",
        fim_warmup=1,
        fim_every=1,
        server_set=toy.server_set(),
    ),
    "co_lora": lambda: h2.co_lora(num_blocks=2, learning_rate=0.02),
    "heterotune": lambda: h2.heterotune(size=4, widths=(3, 2), learning_rate=0.02),
    "fedavg": lambda: h2.fedavg(learning_rate=0.3),
    "fedavg-stacked": lambda: stacked(h2.fedavg(learning_rate=0.3)),
    "local": lambda: h2.local(learning_rate=0.02, optimizer_state="kept"),
    "centralised": lambda: h2.centralised(learning_rate=0.02),
    "fedit": lambda: h2.fedit(learning_rate=0.02, optimizer_state="kept"),
    "ffa_lora": lambda: h2.ffa_lora(learning_rate=0.02),
    "fedsa_lora": lambda: h2.fedsa_lora(learning_rate=0.02),
    "hetlora": lambda: h2.hetlora(learning_rate=0.02, gamma=0.5),
    "flexlora": lambda: h2.flexlora(learning_rate=0.02),
    "flora": lambda: h2.flora(learning_rate=0.02),
    "fedex_lora": lambda: h2.fedex_lora(learning_rate=0.02),
    "fedit-proximal-adam": lambda: h2.server_optimizer(
        h2.proximal(h2.fedit(learning_rate=0.02), mu=0.1), optax.adam(0.05, eps=1e-3)
    ),
}


class Sends(NamedTuple):
    """What a method's row in docs/methods.md says, in shapes and arrays."""

    upload: Callable  # spec -> shapes of one client's upload, masks apart
    # (download, adapters) -> what all of a cohort's clients have in common; None where each gets its
    # own, or nothing
    agrees: Callable | None
    private: tuple[str, ...] = ("head",)  # parts of a client's state that no upload depends on
    whole: bool = True  # all of the upload's numbers travel


def factors(*names):
    """Shapes of A and B by kind."""

    def shapes(spec):
        layers, rank = spec.model.num_layers, spec.rank
        of = {"a": lambda d, f: (layers, d, rank), "b": lambda d, f: (layers, rank, f)}
        return [of[name](*spec.model.shapes[kind]) for name in names for kind in spec.kinds]

    return shapes


def sites(*fields):
    """Read fields of the adapters' sites; of a delta beside the base its sum."""

    def read(download, adapters):
        found = [getattr(site, field) for site in adapters.sites.values() for field in fields]
        return [beside.total(leaf) if isinstance(leaf, beside.Beside) else leaf for leaf in found]

    return read


MODEL = lambda download, adapters: (sites("a", "b")(download, adapters), adapters.head)
ROWS = lambda spec: [(10, toy.INPUT), (10,), (), (), (), ()]  # x, y, count, three settings
HEAD = lambda spec: [(spec.model.width, 3 if spec.name == "narrow" else 2)]
CORES = lambda spec: [(spec.model.num_layers, spec.rank, spec.rank) for _ in spec.kinds]
SOME_LAYERS = lambda spec: (spec.model.num_layers + 1) // 2
LAYERS = lambda spec: [
    *((SOME_LAYERS(spec), *shape[1:]) for shape in factors("a", "b")(spec)),
    (SOME_LAYERS(spec),),
]
SENDS = {
    "h2tune": Sends(
        lambda spec: [(3, len(spec.kinds), 4, 4)],
        lambda download, adapters: download.common.middle,
        private=("head", ".a[", ".b["),
        whole=False,
    ),
    "fedavg": Sends(HEAD, lambda download, adapters: adapters.head, private=()),
    "local": Sends(lambda spec: [], None, private=("head", "'a'", "'b'")),
    "centralised": Sends(ROWS, MODEL, private=(), whole=False),
    "fedit": Sends(factors("a", "b"), sites("a", "b"), private=("head", "'a'", "'b'")),
    "ffa_lora": Sends(factors("b"), sites("a", "b"), private=("head", "'b'")),
    "fedsa_lora": Sends(factors("a"), sites("a"), private=("head", "'a'", "'b'")),
    "hetlora": Sends(
        factors("a", "b"),
        # Ranks prune themselves: one column is what all have.
        lambda download, adapters: [(s.a[..., :1], s.b[:, :1]) for s in adapters.sites.values()],
        private=("head", "'a'", "'b'"),
        whole=False,
    ),
    "flexlora": Sends(factors("a", "b"), sites("a", "b"), private=("head", "'a'", "'b'")),
    "flora": Sends(factors("a", "b"), sites("beside"), private=("head", "'a'", "'b'")),
    "heterotune": Sends(
        lambda spec: [(2, 4, 3), (2, 3, 4)] if spec.name == "narrow" else [(3, 4, 5), (3, 5, 4)],
        lambda download, adapters: (adapters.sites["block"].inner, adapters.sites["block"].outer),
        private=("head", "'down'", "'up'"),
    ),
    # The two that send every client a mean of its own; Co-LoRA's sketch of a gradient depends on all.
    "ce_lora": Sends(
        lambda spec: [*CORES(spec), (2, spec.model.width)], None, private=("head", "'a'", "'b'")
    ),
    "co_lora": Sends(
        lambda spec: [
            shape
            for kind in spec.kinds
            for others in [spec.model.num_layers - 2]
            for shape in [(2, 2, 2), (2, 2), (12,), *[(others, 12, 2), (others, 2, 12)] * others]
        ],
        None,
        private=(),
    ),
    "fedra": Sends(LAYERS, sites("a", "b"), private=("head", "'a'", "'b'")),
    "fed_hello": Sends(
        lambda spec: [*LAYERS(spec), *HEAD(spec)], MODEL, private=("head", "'a'", "'b'")
    ),
    "fedex_lora": Sends(
        factors("a", "b"), sites("a", "b", "beside"), private=("head", "'a'", "'b'")
    ),
}
"""By the first word of a method's name in METHODS."""

ALL = np.arange(5), np.arange(3)
SOME = np.array([4, 1]), np.array([2, 0])


@functools.cache
def build(name):
    return METHODS[name]()


def specs_of(name):
    if name == "co_lora":  # P and Q have one shape for all
        return tuple(dataclasses.replace(spec, rank=2) for spec in toy.make_specs())
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


def run(name, state, *, ids=ALL, weights=None, data=None, hyper=None, seed=toy.SEED, axis="scan"):
    """Run one round; ids and weights are always arrays, so that one program serves many tests."""
    weights = tuple(np.ones(len(i)) for i in ids) if weights is None else weights
    out = program(name, axis)(
        state,
        toy.make_bases(),
        toy.make_data(toy.make_specs()) if data is None else data,
        tuple(np.asarray(i, np.int32) for i in ids),
        tuple(np.asarray(w, np.float32) for w in weights),
        build(name).hyper if hyper is None else hyper,
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
    yield request.param
    # The programs of all methods together need more memory maps than a process may have.
    for cached in (build, program, evaluation, started, two_rounds):
        cached.cache_clear()
    jax.clear_caches()
    gc.collect()


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


def received(name, state):
    """What every client of every cohort has in common with the others right after a download."""
    method, specs = build(name), specs_of(name)
    ids = tuple(jnp.arange(spec.num_clients, dtype=jnp.int32) for spec in specs)
    downloads = method.broadcast(specs, jax.random.key(0), state.server, ids, state.round)
    agrees, out = SENDS[name.split("-")[0]].agrees, []
    for spec, download, clients in zip(specs, downloads, state.clients):
        one = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)
        for i in range(spec.num_clients):
            own = h2.Download(download.common, one(download.personal, i))
            adapters = method.adapters(spec, state.server, one(clients, i), own)
            out.append((spec.name, jax.tree.map(np.asarray, agrees(own, adapters))))
    return out


def test_what_is_shared_changes_and_agrees_between_clients(name):
    third, metrics = run(name, two_rounds(name)[1])
    assert metrics.rejected == {"narrow": 0, "wide": 0}
    if SENDS[name.split("-")[0]].agrees is None:
        leaves = map(jax.tree.leaves, (started(name).server, third.server))
        changed = any((a != b).any() for a, b in zip(*leaves))
        assert changed == (build(name).shared is not None)
        return
    before, after = received(name, started(name)), received(name, third)
    first = {}
    for (cohort, old), (_, new) in zip(before, after):
        assert any((a != b).any() for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new)))
        toy.assert_trees_equal(new, first.setdefault(cohort, new))


def test_nothing_else_leaves_a_client(name):
    method, specs = build(name), specs_of(name)
    sends, state = SENDS[name.split("-")[0]], two_rounds(name)[1]
    ids = tuple(jnp.arange(spec.num_clients, dtype=jnp.int32) for spec in specs)
    key = jax.random.key(0)
    downloads = method.broadcast(specs, key, state.server, ids, state.round)
    one = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    args = zip(specs, toy.make_bases(), state.clients, downloads, toy.make_data(specs))
    for spec, base, clients, (common, personal), data in args:
        given = one(clients), h2.Download(common, one(personal)), h2.ClientData(*one(data))
        update = functools.partial(method.client_update, spec, key, base)
        _, upload, metrics = jax.eval_shape(update, *given, method.hyper, state.round)
        leaves = [leaf for leaf in jax.tree.leaves(upload) if leaf.dtype != bool]
        assert sorted(leaf.shape for leaf in leaves) == sorted(sends.upload(spec))
        assert metrics["numbers_up"].shape == metrics["numbers_down"].shape == ()
        sent = two_rounds(name)[2].clients[spec.name]["numbers_up"]
        size = sum(leaf.size for leaf in leaves)
        assert (sent == size).all() if sends.whole else (sent <= size).all()

    # With rates of zero an upload can only depend on what a client held before.
    def stir(path, leaf):
        private = any(part in jax.tree_util.keystr(path) for part in sends.private)
        return leaf + np.asarray(0.1, leaf.dtype) if private else leaf

    changed = state._replace(clients=jax.tree_util.tree_map_with_path(stir, state.clients))
    assert not sends.private or any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(changed.clients), jax.tree.leaves(state.clients))
    )
    still = method.hyper._replace(
        **{field: jnp.zeros_like(getattr(method.hyper, field)) for field in method.hyper._fields}
    )
    servers = [run(name, each, hyper=still)[0].server for each in (state, changed)]
    toy.assert_trees_equal(*servers)

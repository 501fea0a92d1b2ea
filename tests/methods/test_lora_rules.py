"""The aggregation rules of the LoRA methods against their formulas in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import server as bench
import toy

import h2tune_jax as h2
from h2tune_jax import aggregate
from h2tune_jax.methods.hetlora import HetLoraUpload

WEIGHTS = (
    [1.0, 0.0, 2.0],
    [3.0, 1.0],
    [1.0, 1.0],
)  # the second client of the first cohort does not count
MEANS = {"fedit": ("a", "b"), "ffa_lora": ("b",), "fedsa_lora": ("a",)}


def weighted(uploads, weights, group, part, kind):
    """The mean of one part over a group of cohorts, in float64."""
    leaves = [np.asarray(uploads[i][part][kind], np.float64) for i in group]
    shares = np.concatenate([np.asarray(weights[i], np.float64) for i in group])
    return np.einsum("s,sldr->ldr", shares / shares.sum(), np.concatenate(leaves))


@pytest.mark.parametrize("name", MEANS)
def test_means_run_over_all_tasks_of_an_architecture(name):
    method, parts = getattr(h2, name)(), MEANS[name]
    specs = bench.twins()
    uploads, before = bench.uploads_of(specs, parts=parts), bench.start(method, specs)
    after, _ = bench.aggregate(method, specs, before, uploads, WEIGHTS)
    for group in ((0, 1), (2,)):
        for place in group:
            sites = bench.received(method, specs, after, place).sites
            for kind in specs[place].kinds:
                for part in parts:
                    mean = weighted(uploads, WEIGHTS, group, part, kind)
                    bench.close(getattr(sites[kind], part), mean)
    # The wide cohort was not sampled: its architecture stays, and the other does not notice.
    absent = (*uploads[:2], None)
    without, _ = bench.aggregate(method, specs, before, absent, WEIGHTS)
    wide = aggregate.architecture(specs[2])
    toy.assert_trees_equal(without.factors[wide], before.factors[wide])
    narrow = aggregate.architecture(specs[0])
    toy.assert_trees_equal(without.factors[narrow], after.factors[narrow])


def test_what_is_not_shared_is_frozen_or_personal():
    specs = bench.twins()
    ffa, fedsa = h2.ffa_lora(), h2.fedsa_lora()
    server = bench.start(ffa, specs)
    sites = [bench.received(ffa, specs, server, place).sites for place in (0, 1)]
    for kind in ("q", "up"):  # one frozen A for both tasks
        np.testing.assert_array_equal(sites[0][kind].a, sites[1][kind].a)
        assert float(jnp.abs(sites[0][kind].a).max()) > 0
    client = ffa.init_client(specs[0], jax.random.key(0), None, None)
    assert set(client.params) == {"b", "head"}
    server, _ = bench.aggregate(
        fedsa, specs, bench.start(fedsa, specs), bench.uploads_of(specs, parts=("a",)), WEIGHTS
    )
    client = fedsa.init_client(specs[0], jax.random.key(0), None, None)
    own = jax.tree.map(lambda b: b + 1, client.params["b"])
    client = client._replace(params={**client.params, "b": own})
    download = bench.downloads(fedsa, specs, server)[0]
    adapters = fedsa.adapters(specs[0], server, client, download)
    np.testing.assert_array_equal(adapters.sites["q"].b, own["q"])


def test_uploads_cost_what_the_literature_says():
    """FFA-LoRA sends sum rF up and FedSA-LoRA sum rD, FedIT sum r(D + F)."""
    model = h2.ModelSpec(num_layers=2, sites={"q": (8, 8), "up": (8, 20)}, width=8)
    spec = dataclasses.replace(bench.twins()[0], model=model, rank=3, loss_fn=no_loss)
    data = h2.ClientData({"x": jnp.zeros((4, 1))}, jnp.asarray(4))
    expected = {"ffa_lora": 2 * 3 * 28, "fedsa_lora": 2 * 3 * 16, "fedit": 2 * 3 * 44}
    for name, numbers in expected.items():
        method = getattr(h2, name)()
        server = bench.start(method, (spec,))
        (download,) = bench.downloads(method, (spec,), server)
        client = method.init_client(spec, jax.random.key(0), None, download)
        given = spec, jax.random.key(1), None, client, download, data, method.hyper
        _, upload, metrics = method.client_update(*given, jnp.zeros((), jnp.int32))
        assert sum(leaf.size for leaf in jax.tree.leaves(upload)) == numbers
        assert int(metrics["numbers_up"]) == int(metrics["numbers_down"]) == numbers


def no_loss(adapters, base, batch, key):
    return jnp.zeros(()), {}


# --- HetLoRA


def whole(uploads):
    """Factors as clients send them that have pruned nothing."""
    return tuple(None if factors is None else HetLoraUpload(factors, None) for factors in uploads)


def test_hetlora_pads_weighs_by_norms_and_truncates():
    method, specs = h2.hetlora(), bench.twins(ranks=(2, 5))
    uploads = bench.uploads_of(specs)
    after, _ = bench.aggregate(method, specs, bench.start(method, specs), whole(uploads), WEIGHTS)
    padded, shares = {"q": [], "up": []}, []
    units = [spec.scale / specs[1].scale for spec in specs]  # of rank 5, the largest
    assert units[0] == 2.5
    for place in (0, 1):
        rank = specs[place].rank
        for client, weight in enumerate(WEIGHTS[place]):
            squares = 0.0
            for kind in ("q", "up"):
                a, b = (np.asarray(uploads[place][p][kind][client], np.float64) for p in "ab")
                squares += np.square(a @ b).sum()
                wide = np.zeros((2, 8, 5)), np.zeros((2, 5, 8))
                root = units[place] ** 0.5
                wide[0][:, :, :rank], wide[1][:, :rank] = root * a, root * b
                padded[kind].append(wide)
            shares.append(weight * units[place] * squares**0.5)
    shares = np.asarray(shares) / np.sum(shares)
    for place in (0, 1):
        sites, rank = bench.received(method, specs, after, place).sites, specs[place].rank
        for kind in ("q", "up"):
            a, b = (np.einsum("s,sldr->ldr", shares, np.stack(p)) for p in zip(*padded[kind]))
            root = units[place] ** 0.5
            bench.close(sites[kind].a, a[:, :, :rank] / root)
            bench.close(sites[kind].b, b[:, :rank] / root)


def test_hetlora_columns_that_nobody_of_a_round_holds_stay():
    # Zeros in both factors would never train again.
    method, specs = h2.hetlora(), bench.twins(ranks=(2, 5))
    before = bench.start(method, specs)
    few = whole((bench.uploads_of(specs)[0], None, None))
    after, _ = bench.aggregate(method, specs, before, few, WEIGHTS)
    name = aggregate.architecture(specs[1])
    for kind in ("q", "up"):
        old, new = (server.factors[name] for server in (before, after))
        np.testing.assert_array_equal(new["a"][kind][:, :, 2:], old["a"][kind][:, :, 2:])
        assert float(jnp.abs(new["a"][kind][:, :, 2:]).max()) > 0
        assert float(jnp.abs(new["a"][kind][:, :, :2] - old["a"][kind][:, :, :2]).min()) > 0


def test_hetlora_with_equal_ranks_and_weights_is_fedit():
    specs = bench.twins()
    uploads = bench.uploads_of(specs)
    results = []
    hetlora = h2.hetlora(weighting="given", gamma=1.0)
    for method, sent in ((hetlora, whole(uploads)), (h2.fedit(), uploads)):
        server = bench.start(method, specs)
        results.append(bench.aggregate(method, specs, server, sent, WEIGHTS)[0].factors)
    toy.assert_trees_equal(*results)


def test_hetlora_without_pruning_trains_as_fedit_does():
    # One cohort of the toy federation, two whole rounds.
    specs, bases = toy.make_specs()[1:], toy.make_bases()[1:]
    data = toy.make_data(toy.make_specs())[1:]
    states = []
    for method in (h2.hetlora(weighting="given", gamma=1.0, learning_rate=0.02),
                   h2.fedit(learning_rate=0.02)):  # fmt: skip
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        round_fn = h2.make_round(method, specs)
        for _ in range(2):
            state, _ = round_fn(state, bases, data, None, None, method.hyper, toy.SEED)
        states.append(state)
    one, other = states
    toy.assert_trees_close(one.server.factors, other.server.factors)
    toy.assert_trees_close(one.clients[0].params, other.clients[0].params)


def one_column_pull(adapters, base, batch, key):
    """Pull every column of A towards 1 but the last two, which go to zero."""
    del base, batch, key
    a = adapters.sites["q"].a
    target = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    return jnp.square(a - target[None, None, :]).sum() + 0 * adapters.head.sum(), {}


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_hetlora_drops_a_tail_that_has_shrunk(gamma):
    spec = toy.cohort("only", width=8, depth=2, rank=4, kinds=("q",), classes=2, num_clients=2)
    spec = dataclasses.replace(
        spec, loss_fn=one_column_pull, budget=h2.Budget(batch_size=2, steps=20)
    )
    method = h2.hetlora(learning_rate=0.05, gamma=gamma, lambda_tail=0.0)
    data = (h2.ClientData({"x": jnp.zeros((2, 2, 1))}, jnp.asarray([2, 2])),)
    state = h2.init_round(method, (spec,), (None,), None, jax.random.key(0))
    # B must not be zero, or its tail's norm is.
    factors = jax.tree.map(lambda leaf: leaf + 0.5, state.server.factors)
    state = state._replace(server=state.server._replace(factors=factors))
    round_fn = h2.make_round(method, (spec,))
    state, metrics = round_fn(state, (None,), data, None, None, method.hyper, toy.SEED)
    seen, client = metrics.clients["only"], state.clients[0]
    left = 2 if gamma == 0.5 else 4
    np.testing.assert_array_equal(client.rank, left)
    np.testing.assert_array_equal(seen["numbers_up"], 2 * left * 16)
    np.testing.assert_array_equal(seen["numbers_down"], 2 * 4 * 16)
    kept = np.asarray(client.params["a"]["q"])
    assert (kept[..., left:] == 0).all()
    assert (kept[..., :left] != 0).all()
    # The next round sends and trains what is left, and prunes again: half of two.
    state, metrics = round_fn(state, (None,), data, None, None, method.hyper, toy.SEED)
    np.testing.assert_array_equal(metrics.clients["only"]["numbers_down"], 2 * left * 16)
    assert (np.asarray(state.clients[0].params["b"]["q"])[:, :, left:] == 0).all()


def one_step(rank, *, pull, lambda_tail):
    """A client of so many columns of four takes one step of plain descent at rate 0.1.

    Its task's loss is -pull times the sum of all of A. Returns what it was sent, in float64 and zero
    beyond its rank, its next state and its upload.
    """

    def loss_fn(adapters, base, batch, key):
        del base, batch, key
        total = sum(site.a.sum() for site in adapters.sites.values())
        return -pull * total + 0 * adapters.head.sum(), {}

    spec = toy.cohort("only", width=8, depth=2, rank=4, kinds=("q", "up"), classes=2, num_clients=1)
    spec = dataclasses.replace(spec, loss_fn=loss_fn, budget=h2.Budget(batch_size=2, steps=1))
    method = h2.hetlora(
        learning_rate=0.1, optimizer=optax.identity(), gamma=0.5, lambda_tail=lambda_tail
    )
    factors = jax.tree.map(lambda leaf: leaf[0], bench.uploads_of((spec,))[0])
    download, data = h2.Download(factors, ()), h2.ClientData({"x": jnp.zeros((2, 1))}, jnp.int32(2))
    client = method.init_client(spec, jax.random.key(0), None, download)
    client = client._replace(rank=jnp.int32(rank))
    update = jax.jit(functools.partial(method.client_update, spec, jax.random.key(1), None))
    client, upload, _ = update(client, download, data, method.hyper, jnp.int32(0))
    a, b = (
        {kind: np.array(leaf, np.float64) for kind, leaf in factors[part].items()} for part in "ab"
    )
    for kind in a:
        a[kind][:, :, rank:] = b[kind][:, rank:] = 0
    return a, b, client, upload


@pytest.mark.parametrize(("rank", "tail"), [(4, [2, 3]), (2, [1])])
def test_hetlora_adds_the_tails_product_to_the_loss_and_keeps_a_tail_that_has_grown(rank, tail):
    a, b, client, upload = one_step(rank, pull=10.0, lambda_tail=0.7)
    norm = lambda leaves: np.sqrt(sum(np.square(leaf).sum() for leaf in leaves))
    tails = lambda a, b: (
        norm([leaf[:, :, tail] for leaf in a.values()]),
        norm([leaf[:, tail] for leaf in b.values()]),
    )
    of_a, of_b = tails(a, b)
    new_a, new_b = {}, {}
    for kind in a:
        # Of lambda |A tail| |B tail|: lambda |B tail| A tail / |A tail|, and the other way round.
        slope_a, slope_b = np.zeros_like(a[kind]), np.zeros_like(b[kind])
        slope_a[:, :, :rank] = -10.0
        slope_a[:, :, tail] += 0.7 * of_b * a[kind][:, :, tail] / of_a
        slope_b[:, tail] = 0.7 * of_a * b[kind][:, tail] / of_b
        new_a[kind], new_b[kind] = a[kind] - 0.1 * slope_a, b[kind] - 0.1 * slope_b
    assert np.prod(tails(new_a, new_b)) > 1.1 * of_a * of_b
    assert int(client.rank) == rank
    for kind in a:
        bench.close(upload.factors["a"][kind], new_a[kind])
        bench.close(upload.factors["b"][kind], new_b[kind])
        np.testing.assert_array_equal(client.params["a"][kind], upload.factors["a"][kind])


@pytest.mark.parametrize(("lambda_tail", "left"), [(0.7, 2), (0.0, 4)])
def test_hetlora_prunes_what_its_own_term_has_shrunk_and_not_what_stands_still(lambda_tail, left):
    a, b, client, upload = one_step(4, pull=0.0, lambda_tail=lambda_tail)
    assert int(client.rank) == left
    for kind in a:
        # Nothing but the term pulls, and it pulls nothing but the tail.
        a[kind][:, :, left:] = b[kind][:, left:] = 0
        np.testing.assert_array_equal(upload.factors["a"][kind], a[kind])
        np.testing.assert_array_equal(upload.factors["b"][kind], b[kind])


def test_hetlora_penalty_is_finite_where_a_tail_is_zero():
    specs = toy.make_specs()[1:]
    method = h2.hetlora(gamma=0.5, lambda_tail=10.0)  # at the start B, and so its tail, is zero
    state = h2.init_round(method, specs, toy.make_bases()[1:], None, jax.random.key(0))
    args = toy.make_bases()[1:], toy.make_data(toy.make_specs())[1:], None, None, method.hyper
    _, metrics = h2.make_round(method, specs)(state, *args, toy.SEED)
    assert metrics.rejected == {"wide": 0}


# --- FlexLoRA


@pytest.mark.parametrize("ranks", [(2, 5), (2, 1)])
def test_flexlora_gives_everyone_the_best_approximation_at_its_rank(ranks):
    method, specs = h2.flexlora(), bench.twins(ranks=ranks, alphas=(16.0, 8.0))
    uploads = bench.uploads_of(specs)
    after, _ = bench.aggregate(method, specs, bench.start(method, specs), uploads, WEIGHTS)
    for kind in ("q", "up"):
        mean = bench.mean_delta(specs, (0, 1), uploads, WEIGHTS, kind)
        left, values, right = np.linalg.svd(mean)
        for place in (0, 1):
            site, rank = bench.received(method, specs, after, place).sites[kind], ranks[place]
            best = np.einsum("lir,lr,lrj->lij", left[..., :rank], values[:, :rank], right[:, :rank])
            bench.close(bench.delta(site), best, 5e-5)
            # Singular values are split evenly over both factors.
            a, b = np.asarray(site.a), np.asarray(site.b)
            root = np.sqrt(values[:, :rank] / site.scale)
            bench.close(np.linalg.norm(a, axis=1), root, 5e-5)
            bench.close(np.linalg.norm(b, axis=2), root, 5e-5)


def test_flexlora_never_forms_the_product():
    """No array of the program has as many numbers as D x F, which what merges a product has."""
    model = h2.ModelSpec(num_layers=1, sites={"q": (64, 96)})
    spec = dataclasses.replace(
        bench.twins(num_clients=(3, 2))[0], model=model, targets=("q",), rank=2
    )
    uploads = bench.uploads_of((spec,))
    largest = {}
    for method in (h2.flexlora(), h2.flora()):
        server = bench.start(method, (spec,))
        run = lambda server, uploads, method=method: bench.aggregate(
            method, (spec,), server, uploads, WEIGHTS[:1]
        )
        shapes = shapes_in(jax.make_jaxpr(run)(server, uploads).jaxpr)
        largest[method.name] = max(np.prod(shape, dtype=int) for shape in shapes)
    assert largest["flexlora"] < 64 * 96 <= largest["flora"]


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(inner, "jaxpr"):
                yield from shapes_in(inner.jaxpr)
            elif hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_flexlora_leaves_no_column_dead():
    """A mean of rank 2 for a client of rank 5: three columns start as a fresh LoRA's."""
    method, specs = h2.flexlora(), bench.twins(ranks=(2, 5), num_clients=(1, 2))
    weights = [1.0], [0.0, 0.0], [1.0, 1.0]
    uploads = bench.uploads_of(specs)
    after, _ = bench.aggregate(method, specs, bench.start(method, specs), uploads, weights)
    site = bench.received(method, specs, after, 1).sites["q"]
    bench.close(bench.delta(site), bench.mean_delta(specs, (0,), uploads, weights, "q"), 5e-5)
    assert (np.asarray(site.b)[:, 2:] == 0).all()
    assert (np.linalg.norm(np.asarray(site.a)[:, :, 2:], axis=1) > 0.1).all()
    nobody = [0.0], [0.0, 0.0], [0.0, 0.0]
    still, _ = bench.aggregate(method, specs, after, uploads, nobody)
    toy.assert_trees_equal(still, after)


# --- what methods refuse


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("fedit", {"ranks": (2, 3)}, "rank"),
        ("ffa_lora", {"ranks": (2, 3)}, "rank"),
        ("fedsa_lora", {"alphas": (16.0, 8.0)}, "alpha"),
        ("fedex_lora", {"ranks": (2, 3)}, "rank"),
    ],
)
def test_unequal_cohorts_of_one_architecture_are_refused_by_name(name, changes, field):
    with pytest.raises(h2.FederationError, match=f"cohort 'second': {field} .*'first'.*{name}"):
        getattr(h2, name)().check(bench.twins(**changes))
    getattr(h2, name)().check(bench.twins())


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "flora"])
def test_ranks_may_differ_where_the_rule_allows_it(name):
    method = getattr(h2, name)()
    method.check(bench.twins(ranks=(2, 5)))
    specs = bench.twins()
    other = dataclasses.replace(specs[1], targets=("q",))
    with pytest.raises(h2.FederationError, match="cohort 'second': targets"):
        method.check((specs[0], other))
    none = dataclasses.replace(specs[0], targets=())
    with pytest.raises(h2.FederationError, match="cohort 'first': targets is empty"):
        method.check((none,))


def test_models_of_different_names_are_different_architectures():
    specs = bench.twins(ranks=(2, 3))
    renamed = dataclasses.replace(specs[1].model, name="another base")
    h2.fedit().check((specs[0], dataclasses.replace(specs[1], model=renamed)))


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.5}, "gamma"),
        ({"weighting": "norms"}, "did you mean 'norm'"),
        ({"lambda_tail": -1.0}, "lambda_tail"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"optimizer_state": "keep"}, "optimizer_state"),
    ):
        with pytest.raises(h2.FederationError, match=message):
            h2.hetlora(**options)
    with pytest.raises(h2.FederationError, match="budget"):
        h2.centralised(budget="some")
    with pytest.raises(h2.FederationError, match=r"flexlora: .* use optimizer_state 'restart'"):
        h2.flexlora(optimizer_state="kept")

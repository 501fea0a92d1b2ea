"""Subsets of layers: the mean over holders by hand, what is drawn, and Fed-HeLLo's scores and groups."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.methods.fed_hello.allocation import (
    SHAPES,
    group_weights,
    shape_order,
    shape_weights,
)
from h2tune_jax.methods.fed_hello.fisher import layer_scores
from h2tune_jax.methods.layer_subsets import LayerUpload, draw_layers
from h2tune_jax.methods.lora import assemble
from h2tune_jax.methods.start import init_factors
from h2tune_jax.tasks import losses


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_specs(**changes):
    """Two cohorts of one architecture, with one maker of heads, that can afford different depths."""
    few = toy.cohort("few", width=8, depth=4, rank=2, kinds=("q",), classes=3, num_clients=3)
    few = dataclasses.replace(few, **changes)
    return few, dataclasses.replace(few, name="many", num_clients=2)


@functools.cache
def base():
    return toy.init_base(1, 8, 4, ("q",))


@functools.cache
def data():
    rng = np.random.default_rng(0)
    rows = lambda count: h2.ClientData(
        {
            "x": jnp.asarray(rng.normal(size=(count, 6, toy.INPUT)), jnp.float32),
            "y": jnp.asarray(rng.integers(0, 3, (count, 6)), jnp.int32),
        },
        jnp.full(count, 6, jnp.int32),
    )
    return rows(3), rows(2)


def start(method, specs):
    return h2.init_round(method, specs, (base(), base()), None, jax.random.key(0))


def rounds(method, specs, probe=None):
    """One round as a function of the state."""
    round_fn = h2.make_round(method, specs, donate=False)
    rest = (base(), base()), data(), None, None, method.hyper, toy.SEED
    return lambda state: round_fn(state, *rest, probe)


def upload(layers, a, b, head):
    """One client's upload of one kind with scalars for matrices."""
    column = lambda values: {"q": jnp.asarray(values, jnp.float32)[:, None, None]}
    moved = {"a": column(a), "b": column(b)}
    return LayerUpload(moved, jnp.asarray(layers, jnp.int32), jnp.asarray(head, jnp.float32))


def test_the_server_adds_the_mean_over_those_who_trained_a_layer():
    specs = make_specs(model=h2.ModelSpec(num_layers=4, sites={"q": (1, 1)}), rank=1)
    method = h2.fedra(budgets={"few": 1, "many": 3}, heads="shared")
    server = method.init_server(specs, jax.random.key(0), None, None)
    ((own, _),) = server.factors.items()
    ones = {"q": jnp.ones((4, 1, 1))}
    server = server._replace(factors={own: {"a": ones, "b": ones}})
    # Layer 0: one client (weight 2) moves A by 4. Layer 2: weights 2 and 1 move it by 3 and 0, and a
    # client of weight zero by 9. Layers 1 and 3: one client of weight 1.
    few = [(upload([0], [4.0], [0.0], 6.0), 2.0), (upload([2], [9.0], [9.0], 9.0), 0.0)]
    many = [
        (upload([1, 2, 3], [1.0, 0.0, 2.0], [0.0, 0.0, 0.0], 0.0), 1.0),
        (upload([2, 2, 2], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 0.0), 0.0),
    ]
    few.append((upload([2], [3.0], [6.0], 3.0), 2.0))
    sums = []
    for spec, sent in zip(specs, (few, many)):
        each = [method.reduce(spec, one, jnp.asarray(weight)) for one, weight in sent]
        sums.append(jax.tree.map(lambda *leaves: sum(leaves), *each))
    after, _ = method.server_aggregate(
        specs, None, server, None, None, tuple(sums), None, None, jnp.int32(0)
    )
    a, b = after.factors[own]["a"]["q"].ravel(), after.factors[own]["b"]["q"].ravel()
    np.testing.assert_allclose(a, [5, 2, 1 + 2 * 3 / 3, 3], rtol=1e-6)
    np.testing.assert_allclose(b, [1, 1, 1 + 2 * 6 / 3, 1], rtol=1e-6)
    # The head: (2 * 6 + 2 * 3 + 1 * 0) / 5, over both cohorts.
    np.testing.assert_allclose(after.heads["few"], 18 / 5, rtol=1e-6)


def test_a_server_optimiser_keeps_the_momentum_of_layers_that_nobody_trained():
    specs = make_specs(model=h2.ModelSpec(num_layers=4, sites={"q": (1, 1)}), rank=1)[:1]
    method = h2.server_optimizer(h2.fedra(), optax.sgd(0.5, momentum=0.9))
    server = method.init_server(specs, jax.random.key(0), None, None)
    ((own, _),) = server.inner.factors.items()
    ones = {"q": jnp.ones((4, 1, 1))}
    server = server._replace(inner=server.inner._replace(factors={own: {"a": ones, "b": ones}}))
    # Each round one client of weight 1, and a further one of weight 3 in the first: layers, A's moves.
    rounds_of = [
        [([0, 2], [8.0, 3.0], 1.0), ([0], [4.0], 3.0)],  # means 5 and 3
        [([2, 3], [1.0, 2.0], 1.0)],
        [([0], [0.0], 1.0)],
    ]
    expected = [
        [1 + 0.5 * 5, 1, 1 + 0.5 * 3, 1],
        [3.5, 1, 2.5 + 0.5 * (0.9 * 3 + 1), 1 + 0.5 * 2],
        [3.5 + 0.5 * 0.9 * 5, 1, 4.35, 2],
    ]
    for round_index, (clients, now) in enumerate(zip(rounds_of, expected)):
        sums = []
        for layers, moves, weight in clients:
            sent = upload(layers, moves, [0.0] * len(layers), 0.0)._replace(head=None)
            sums.append(method.reduce(specs[0], sent, jnp.float32(weight)))
        total = (jax.tree.map(lambda *leaves: sum(leaves), *sums),)
        rest = None, None, total, None, None, jnp.int32(round_index)
        server, _ = method.server_aggregate(specs, None, server, *rest)
        factors = server.inner.factors[own]
        np.testing.assert_allclose(factors["a"]["q"].ravel(), now, rtol=1e-6)
        np.testing.assert_array_equal(factors["b"]["q"], 1)


def test_a_layer_that_nobody_trained_stays():
    specs, method = make_specs(), h2.fed_hello(allocation="gd", shape="triangle", learning_rate=0.1)
    state = start(method, specs)
    after, metrics = rounds(method, specs)(state)
    for old, new in zip(*(jax.tree.leaves(s.server.factors) for s in (state, after))):
        moved = np.abs(new - old).max(axis=(1, 2)) > 0
        # At first B is zero, and A gets no gradient in the first step.
        assert set(np.flatnonzero(moved)) <= {0, 1}
    b = next(iter(after.server.factors.values()))["b"]["q"]
    assert np.abs(b[0]).max() > 0
    np.testing.assert_array_equal(b[2:], 0)
    # Half of four layers of one kind: 2 * (8 * 2 + 2 * 8), and which they are.
    np.testing.assert_array_equal(metrics.clients["few"]["numbers_up"], [2 * 32 + 2] * 3)
    np.testing.assert_array_equal(metrics.clients["few"]["numbers_down"], [4 * 32 + 2] * 3)


def test_untrained_layers_have_no_optimiser_state():
    specs, method = make_specs(), h2.fedra(budgets={"few": 1, "many": 3})
    state = start(method, specs)
    download = method.broadcast(specs, jax.random.key(0), state.server, (jnp.arange(3),) * 2,
                                jnp.int32(0))  # fmt: skip
    one = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    given = one(state.clients[0]), h2.Download(download[0].common, one(download[0].personal))
    rest = one(data()[0]), method.hyper, jnp.int32(0)
    jaxpr = jax.make_jaxpr(functools.partial(method.client_update, specs[0]))(
        jax.random.key(0), base(), *given, *rest
    )
    (loop,) = (eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "while")
    carried = [var.aval.shape for var in loop.outvars]
    # A and its two moments, of one layer; the full stacks are constants of the loop.
    assert carried.count((1, 8, 2)) == 3
    assert carried.count((1, 2, 8)) == 3
    assert (4, 8, 2) not in carried


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        inner = [p for p in eqn.params.values() if hasattr(p, "jaxpr")]
        if eqn.primitive.name in ("pjit", "jit"):
            yield from _equations(inner[0].jaxpr)
        else:
            yield eqn


def test_a_clients_draw_is_its_own():
    specs, method = make_specs(), h2.fedra(budgets={"few": 2, "many": 3})
    server = start(method, specs).server
    send = lambda *ids: method.broadcast(specs, jax.random.key(3), server, ids, jnp.int32(0))
    everyone, some = send(jnp.arange(3), jnp.arange(2)), send(jnp.asarray([2, 0]), jnp.arange(0))
    np.testing.assert_array_equal(some[0].personal, everyone[0].personal[jnp.asarray([2, 0])])
    assert everyone[1].personal.shape == (2, 3)
    for layers in everyone[1].personal:
        assert len(set(layers.tolist())) == 3
        assert sorted(layers.tolist()) == layers.tolist()


def test_draws_follow_the_weights_without_replacement():
    weights, draws = np.array([0.1, 0.2, 0.3, 0.4]), 20000
    keys = jax.random.split(jax.random.key(0), draws)
    layers = jax.jit(jax.vmap(lambda k: draw_layers(k, jnp.asarray(weights), 2)))(keys)
    seen = np.bincount(np.asarray(layers).ravel(), minlength=4) / draws
    # First one, then another from the rest: P(l) = w_l + sum over m of w_m w_l / (1 - w_m).
    others = weights[None] * weights[:, None] / (1 - weights[:, None])
    expected = weights + others.sum(axis=0) - np.diag(others)
    np.testing.assert_allclose(seen, expected, atol=4 * 0.5 / draws**0.5)


def test_shapes_over_depth():
    twelve = np.array([3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3]) / 27  # the public code's bottleneck
    np.testing.assert_allclose(shape_weights("bottleneck", 12), twelve)
    np.testing.assert_allclose(shape_weights("bottleneck", 4), np.array([3, 2, 1, 3]) / 9)
    np.testing.assert_allclose(shape_weights("triangle", 4), np.array([4, 3, 2, 1]) / 10)
    np.testing.assert_allclose(shape_weights("inverted_triangle", 3), np.array([1, 2, 3]) / 6)
    np.testing.assert_allclose(shape_weights("uniform", 5), np.full(5, 0.2))
    # Largest weight first; among equals the farthest from what is given, then the lower.
    assert shape_order("uniform", 5).tolist() == [0, 4, 2, 1, 3]
    assert shape_order("bottleneck", 4).tolist() == [0, 3, 1, 2]
    assert shape_order("triangle", 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert shape_order("inverted_triangle", 3).tolist() == [2, 1, 0]
    for shape in SHAPES:
        assert sorted(shape_order(shape, 7)) == list(range(7))


def test_groups_are_those_of_k_means():
    scores = np.array([0.11, 5.2, 0.1, 9.9, 4.9, 0.12, 10.1], np.float32)
    weights = group_weights(jnp.asarray(scores))
    np.testing.assert_allclose(weights, np.array([1, 2, 1, 3, 2, 1, 3]) / 13, rtol=1e-6)
    # Equal scores fall into one group, and nothing divides by zero.
    np.testing.assert_allclose(group_weights(jnp.ones(3)), np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(group_weights(jnp.ones(1)), [1], rtol=1e-6)


@pytest.mark.parametrize("target", ["logit", "log_likelihood"])
def test_scores_by_the_definition(target):
    spec, _ = make_specs()
    head = draw(1, 8, 3)
    factors = init_factors(spec, jax.random.key(0))
    factors = jax.tree.map(lambda leaf: draw(2, *leaf.shape), factors)
    examples = jax.tree.map(lambda leaf: leaf[0], data()[0].examples)

    def wanted(factors, x, label):
        """The true label's logit, or its log-likelihood, one example at a time."""
        hidden = jnp.tanh(x @ base()["embed"])
        for layer in range(4):
            low_rank = (hidden @ factors["a"]["q"][layer]) @ factors["b"]["q"][layer]
            product = hidden @ base()["q"][layer] + spec.scale * low_rank
            hidden = hidden + jnp.tanh(product)
        logits = hidden @ head
        return logits[label] if target == "logit" else jax.nn.log_softmax(logits)[label]

    fisher = jax.tree.map(lambda leaf: np.zeros(leaf.shape), factors)
    for x, label in zip(examples["x"], examples["y"]):
        grads = jax.grad(wanted)(factors, x, label)
        fisher = jax.tree.map(lambda sums, g: sums + np.square(np.asarray(g)) / 6, fisher, grads)
    expected = sum(np.sqrt(np.square(leaf).sum(axis=(1, 2))) for leaf in jax.tree.leaves(fisher))
    scores = layer_scores(spec, base(), factors, head, examples, target)
    np.testing.assert_allclose(scores, expected, rtol=2e-4)


def test_a_languages_true_logits_are_those_at_the_positions_that_count():
    tokens = jnp.asarray([[4, 1, 3, 0, 2]], jnp.int32)
    answer = jnp.asarray([[False, True, True, False, True]])
    weight, x = draw(0, 6, 5), draw(1, 1, 5, 6)

    def logits_of(sites):
        return h2.adapted(x, weight, jax.tree.map(lambda leaf: leaf[0], sites["q"]))

    def loss_fn(adapters, base, batch, key):
        # Infinities where nothing counts must not matter.
        logits = logits_of(adapters.sites).at[:, 2].set(jnp.inf)
        return losses.causal_lm(logits, tokens, answer, batch.mask)

    spec, _ = make_specs(model=h2.ModelSpec(num_layers=1, sites={"q": (6, 5)}), loss_fn=loss_fn)
    parts = {"a": {"q": draw(2, 1, 6, 2)}, "b": {"q": draw(3, 1, 2, 5)}}

    def wanted(parts):
        logits = logits_of(assemble(spec, {**parts, "head": None}).sites)[0]
        return (logits[0, 1] + logits[1, 3] + logits[3, 2]) / 3

    grads = jax.tree.leaves(jax.grad(wanted)(parts))
    expected = sum(jnp.linalg.norm(leaf.ravel() ** 2) for leaf in grads)
    scores = layer_scores(spec, None, parts, None, {"one": jnp.zeros(1)}, "logit")
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4)


def test_scores_are_taken_when_it_is_time_and_then_used():
    specs = make_specs()
    one = jax.tree.map(lambda leaf: leaf[0], data()[0].examples)
    options = {"heads": "shared", "fim_warmup": 2, "fim_every": 2, "learning_rate": 0.05}
    method = h2.fed_hello(allocation="combined", shape="triangle", **options)
    state, known, scores = start(method, specs), [], []
    run = rounds(method, specs, probe=(one, None))
    for _ in range(4):
        state, _ = run(state)
        (account,) = state.server.accounts.values()
        known.append(bool(account.known))
        scores.append(np.asarray(account.scores))
    assert known == [False, True, True, True]
    np.testing.assert_array_equal(scores[1], scores[2])
    assert (scores[3] != scores[2]).all()

    # Once they are known, layers of a higher group are drawn more often.
    account = account._replace(scores=jnp.asarray([1.0, 1.1, 9.0, 5.0]))
    server = state.server._replace(accounts=dict.fromkeys(state.server.accounts, account))
    single = h2.fed_hello(allocation="fim", budgets={"few": 1, "many": 1}, **options)
    seen = shares_drawn(specs, single, server)
    np.testing.assert_allclose(seen, np.array([1, 1, 3, 2]) / 7, atol=4 * 0.5 / 1500**0.5)


def shares_drawn(specs, method, server, *, draws=500):
    """How often each of four layers is drawn by clients of one layer."""
    send = jax.jit(
        lambda key: method.broadcast(specs, key, server, (jnp.arange(3),) * 2, jnp.int32(0))
    )
    drawn = [send(jax.random.key(seed))[0].personal.ravel() for seed in range(draws)]
    return np.bincount(np.concatenate(drawn), minlength=4) / (3 * draws)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"allocation": "rgd", "shape": "inverted_triangle"}, np.array([1, 2, 3, 4]) / 10),
        ({"allocation": "rgd", "shape": "triangle"}, np.array([4, 3, 2, 1]) / 10),
        ({"allocation": "combined", "shape": "triangle"}, np.array([4, 3, 2, 1]) / 10),
        ({"allocation": "fim", "shape": "triangle"}, np.full(4, 0.25)),
        ({"allocation": "gd", "shape": "inverted_triangle"}, np.array([0, 0, 0, 1])),
    ],
)
def test_layers_are_drawn_by_the_shape_until_there_are_scores(options, expected):
    specs = make_specs()
    method = h2.fed_hello(**options, heads="shared", budgets={"few": 1, "many": 1})
    seen = shares_drawn(specs, method, start(method, specs).server)
    np.testing.assert_allclose(seen, expected, atol=4 * 0.5 / 1500**0.5)


def test_a_regressions_logit_is_not_a_classs():
    loss_fn = lambda adapters, base, batch, key: (jnp.zeros(()), {"logits": jnp.zeros((1, 1))})
    spec, _ = make_specs(loss_fn=loss_fn)
    factors = init_factors(spec, jax.random.key(0))
    with pytest.raises(h2.FederationError, match="take fisher='log_likelihood'"):
        layer_scores(spec, base(), factors, None, {"x": jnp.zeros((2, 3))}, "logit")


def test_scores_are_those_of_what_a_server_optimiser_leaves():
    specs = make_specs()
    one = jax.tree.map(lambda leaf: leaf[0], data()[0].examples)
    options = {"allocation": "fim", "heads": "shared", "fim_warmup": 1, "fim_every": 1}
    method = h2.server_optimizer(h2.fed_hello(**options), optax.sgd(3.0))
    server = method.init_server(specs, jax.random.key(0), None, None)
    sums = []
    for place, spec in enumerate(specs):
        factors = {name: draw(place, 2, 8, 2) for name in ("a", "b")}
        moved = {"a": {"q": factors["a"]}, "b": {"q": factors["b"].mT}}
        layers = jnp.asarray([0, 2], jnp.int32)
        sums.append(method.reduce(spec, LayerUpload(moved, layers, draw(9, 8, 3)), jnp.float32(1)))
    rest = tuple(sums), None, None, jnp.int32(0)
    after, _ = method.server_aggregate(specs, None, server, (base(),) * 2, (one, None), *rest)
    ((own, factors),) = after.inner.factors.items()
    wanted = layer_scores(specs[0], base(), factors, after.inner.heads["few"], one, "logit")
    np.testing.assert_allclose(after.inner.accounts[own].scores, wanted, rtol=1e-4)


def test_a_server_optimiser_scores_once_and_falls_back_on_the_last_good_scores():
    specs = make_specs()
    one = jax.tree.map(lambda leaf: leaf[0], data()[0].examples)
    options = {"allocation": "fim", "heads": "shared", "fim_warmup": 1, "fim_every": 1}
    # So long a step leaves nothing finite to score, though the mean itself would be.
    method = h2.server_optimizer(h2.fed_hello(**options), optax.sgd(float("inf")))
    server = method.init_server(specs, jax.random.key(0), None, None)
    ((own, account),) = server.inner.accounts.items()
    last = account._replace(scores=jnp.asarray([1.0, 2.0, 3.0, 4.0]), known=jnp.asarray(True))
    server = server._replace(inner=server.inner._replace(accounts={own: last}))
    moved = {"a": {"q": draw(0, 2, 8, 2)}, "b": {"q": draw(1, 2, 2, 8)}}
    sent = LayerUpload(moved, jnp.asarray([0, 2], jnp.int32), draw(9, 8, 3))
    rest = (base(),) * 2, (one, None), (method.reduce(specs[0], sent, jnp.float32(1)), None), None
    step = jax.jit(
        lambda server, now: method.server_aggregate(specs, None, server, *rest, None, now)[0]
    )
    program = step.lower(server, jnp.int32(0)).compile()
    after = program(server, jnp.int32(0)).inner
    assert not np.isfinite(after.factors[own]["a"]["q"]).all()
    toy.assert_trees_equal(after.accounts[own], last)
    # Scores are taken in a branch, in the rounds in which they are due: the program has one.
    assert program.as_text().count(" conditional(") == 1


def test_heads_are_shared_by_those_who_were_given_the_same_maker():
    specs = make_specs()
    other = dataclasses.replace(specs[1], init_head_fn=lambda key: jnp.zeros((8, 3)))
    shared = h2.fedra(heads="shared")
    assert list(start(shared, specs).server.heads) == ["few"]
    assert list(start(shared, (specs[0], other)).server.heads) == ["few", "many"]
    assert start(h2.fedra(), specs).server.heads == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "fmi"}, "allocation: 'fmi' is unknown"),
        ({"shape": "trangle"}, "did you mean 'triangle'"),
        ({"budgets": {"fwe": 1}}, "did you mean 'few'"),
        ({"budgets": {"few": 5}}, "budgets: 5 is above the 4 there are"),
        ({"budgets": {"few": 0}}, "budgets: must be a whole number"),
        ({"allocation": "fim"}, "needs heads='shared'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(h2.FederationError, match=message):
        start(h2.fed_hello(**options), make_specs())


@pytest.mark.parametrize(
    ("probe", "message"),
    [(None, "needs a small labelled server set"), ((None, None), "no server set for it")],
)
def test_a_missing_server_set_is_told_before_compiling(probe, message):
    specs, method = make_specs(), h2.fed_hello(allocation="fim", heads="shared")
    with pytest.raises(h2.FederationError, match=message):
        rounds(method, specs, probe)(start(method, specs))

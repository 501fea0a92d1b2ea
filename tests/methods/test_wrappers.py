"""FedProx and server optimisers around other methods."""

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

SGD = {"learning_rate": 0.05, "optimizer": optax.identity()}
WEIGHTS = [1.0, 0.0, 2.0], [3.0, 1.0], [1.0, 1.0]


def pull_to_four(adapters, base, batch, key):
    del base, batch, key
    return 0.5 * jnp.square(adapters.head - 4.0), {}


def test_the_proximal_term_by_hand():
    spec = toy.cohort("only", width=4, depth=1, rank=1, kinds=(), classes=2, num_clients=1)
    spec = dataclasses.replace(
        spec,
        loss_fn=pull_to_four,
        init_head_fn=lambda key: jnp.asarray(1.0),
        budget=h2.Budget(batch_size=1, steps=2),
    )
    data = (h2.ClientData({"x": jnp.zeros((1, 1, 1))}, jnp.asarray([1])),)
    method = h2.proximal(h2.fedavg(learning_rate=0.5), mu=2.0)
    state = h2.init_round(method, (spec,), (None,), None, jax.random.key(0))
    round_fn = h2.make_round(method, (spec,), donate=False)
    for mu, expected in ((2.0, 1.75), (0.0, 3.25)):
        # 1 -> 1 - 0.5 (1 - 4) = 2.5; then 2.5 - 0.5 ((2.5 - 4) + mu (2.5 - 1)).
        hyper = method.hyper._replace(proximal_mu=jnp.asarray(mu))
        after, metrics = round_fn(state, (None,), data, None, None, hyper, toy.SEED)
        np.testing.assert_allclose(after.server.models["only"], expected)
        # The loss that is reported is the task's.
        np.testing.assert_allclose(metrics.clients["only"]["loss"], [(4.5 + 1.125) / 2])


SHARE = {
    name: functools.partial(getattr(h2, name), **SGD)
    for name in (
        "h2tune", "fedit", "ffa_lora", "fedsa_lora", "hetlora", "flexlora", "flora", "fedex_lora",
        "fedra", "fed_hello", "ce_lora",
    )
} | {
    "h2tune-transpose": lambda: h2.h2tune(
        **SGD, upload="transpose", core="pure", alternation="joint"
    ),
    "co_lora": lambda: h2.co_lora(**SGD, num_blocks=2),
    "heterotune": lambda: h2.heterotune(**SGD, size=4, widths=(3, 2)),
}  # fmt: skip


# Clients that train the same parts as those of a method that is not slow: FedIT, FLoRA, Fed-HeLLo.
ALIKE = ("ffa_lora", "flexlora", "fedex_lora", "fedra")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in SHARE],
)
def test_a_large_pull_holds_what_is_shared_and_nothing_else(name):
    method = h2.proximal(SHARE[name](), mu=0.0)
    specs = toy.make_specs(budget=h2.Budget(batch_size=4, steps=10))[1:]
    bases, data, texts = toy.make_bases()[1:], toy.make_data(toy.make_specs()), toy.probe()[1:]
    state = toy.stir(h2.init_round(method, specs, bases, texts, jax.random.key(0)))
    download = method.broadcast(
        specs, jax.random.key(0), state.server, (jnp.arange(1),), state.round
    )[0]
    one = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    given = one(state.clients[0]), h2.Download(download.common, one(download.personal))
    update = jax.jit(
        lambda hyper: method.client_update(
            specs[0], jax.random.key(5), bases[0], *given, h2.ClientData(*one(data[1])), hyper,
            state.round,
        )
    )  # fmt: skip
    results = {mu: update(method.hyper._replace(proximal_mu=jnp.asarray(mu))) for mu in (0.0, 15.0)}
    if name == "co_lora":
        # Its sketch is no part, and its own branch is pulled to the one that it has heard.
        results = {mu: (client, up.parts, seen) for mu, (client, up, seen) in results.items()}
        still = given[1].personal
    else:
        still = update(jax.tree.map(jnp.zeros_like, method.hyper))[1]
    moved = {
        mu: float(optax.tree.norm(jax.tree.map(jnp.subtract, floats(up), floats(still))))
        for mu, (_, up, _) in results.items()
    }
    # Under a constant gradient g ten steps add up to 10 g, with the pull to g / (rate mu) = 1.33 g.
    assert 0 < moved[15.0] < 0.6 * moved[0.0]
    start = given[0]
    for client, _, _ in results.values():  # heads are free at either pull
        old, new = head_of(start), head_of(client)
        assert float(jnp.abs(new - old).max()) > 1e-3


def floats(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def head_of(client):
    return client.head if hasattr(client, "head") else client.params["head"]


def test_nothing_to_hold_is_refused():
    for method in (h2.local(), h2.centralised()):
        with pytest.raises(h2.FederationError, match="share nothing"):
            h2.proximal(method, mu=0.1)
    with pytest.raises(h2.FederationError, match="already"):
        h2.proximal(h2.proximal(h2.fedit(), mu=0.1), mu=0.1)
    with pytest.raises(h2.FederationError, match="mu"):
        h2.proximal(h2.fedit(), mu=-1.0)
    one, other = (h2.proximal(h2.fedit(), mu=0.1).hyper for _ in range(2))
    assert type(one) is type(other)


def two_rounds(transformation, plain=None, parts=("a", "b")):
    plain = plain or h2.fedit()
    method, specs = h2.server_optimizer(plain, transformation), bench.twins()
    server = bench.start(method, specs)
    path, means = [server.inner.factors], []
    for round_index in range(2):
        uploads = bench.uploads_of(specs, parts=parts, seed=round_index)
        server, _ = bench.aggregate(method, specs, server, uploads, WEIGHTS, round_index)
        path.append(server.inner.factors)
        mean, _ = bench.aggregate(plain, specs, bench.start(plain, specs), uploads, WEIGHTS)
        means.append(mean.factors)
    exact = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    return exact(path), exact(means)


def test_a_rate_of_one_is_the_plain_mean():
    path, means = two_rounds(optax.sgd(1.0))
    toy.assert_trees_close(path[1:], means)


@pytest.mark.parametrize(("name", "parts"), [("fedit", ("a", "b")), ("fedsa_lora", ("a",))])
def test_momentum_by_its_formula(name, parts):
    path, means = two_rounds(optax.sgd(0.5, momentum=0.9), getattr(h2, name)(), parts)
    first = jax.tree.map(lambda w, m: w - 0.5 * (w - m), path[0], means[0])
    toy.assert_trees_close(path[1], first)
    velocity = jax.tree.map(
        lambda w0, m0, w1, m1: 0.9 * (w0 - m0) + (w1 - m1), path[0], means[0], path[1], means[1]
    )
    second = jax.tree.map(lambda w, v: w - 0.5 * v, path[1], velocity)
    toy.assert_trees_close(path[2], second)


@pytest.mark.parametrize(
    ("transformation", "start", "second_moment"),
    [
        (optax.adam(0.3, b1=0.8, b2=0.9, eps=1e-3), 0.0, lambda v, g: 0.9 * v + 0.1 * g**2),
        (
            optax.yogi(0.3, b1=0.8, b2=0.9, eps=1e-3),
            1e-6,
            lambda v, g: v - 0.1 * np.sign(v - g**2) * g**2,
        ),
    ],
    ids=["adam", "yogi"],
)
def test_adam_and_yogi_by_their_formulas(transformation, start, second_moment):
    path, means = two_rounds(transformation)
    for i, w in enumerate(leaves := jax.tree.leaves(path[0])):
        m, v = np.full_like(w, start), np.full_like(w, start)
        for t, (after, mean) in enumerate(zip(path[1:], means), start=1):
            g = w - jax.tree.leaves(mean)[i]
            m, v = 0.8 * m + 0.2 * g, second_moment(v, g)
            w = w - 0.3 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
            np.testing.assert_allclose(jax.tree.leaves(after)[i], w, rtol=1e-4, atol=1e-5)
    assert leaves


def test_what_is_sent_in_16_bits_is_moved_in_32():
    # Each step is a quarter of what bfloat16 can tell from 1; twenty of them are five.
    specs = tuple(dataclasses.replace(spec, dtype="bfloat16") for spec in bench.twins())
    method = h2.server_optimizer(h2.fedit(), optax.adam(2.0**-10, eps=1e-8))
    server = bench.start(method, specs)
    ones = lambda tree: jax.tree.map(jnp.ones_like, tree)
    start = server.inner._replace(factors=ones(server.inner.factors))
    server = server._replace(inner=start, wide=ones(server.wide))
    uploads = jax.tree.map(jnp.zeros_like, bench.uploads_of(specs))
    for round_index in range(20):
        server, _ = bench.aggregate(method, specs, server, uploads, WEIGHTS, round_index)
    for leaf in jax.tree.leaves(server.inner.factors):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, jnp.bfloat16(1 - 20 * 2.0**-10))
    floats = [x for x in jax.tree.leaves(server.opts) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floats} == {"float32"}


def test_a_round_in_which_nobody_counts_moves_nothing():
    method = h2.server_optimizer(h2.fedit(), optax.sgd(1.0, momentum=0.9))
    specs = bench.twins()
    uploads = bench.uploads_of(specs)
    server, _ = bench.aggregate(method, specs, bench.start(method, specs), uploads, WEIGHTS)
    nobody = [0.0] * 3, [0.0] * 2, [0.0] * 2
    still, _ = bench.aggregate(method, specs, server, uploads, nobody)
    toy.assert_trees_equal(still, server)


@pytest.mark.parametrize("transformation", [optax.sgd(1.0, momentum=0.9), optax.adam(0.1)])
def test_a_round_that_an_architecture_missed_is_none_for_it(transformation):
    method, specs = h2.server_optimizer(h2.fedit(), transformation), bench.twins()
    narrow, wide = (aggregate.architecture(specs[place]) for place in (0, 2))

    def path(*rounds):
        """The server after each of these rounds; of some the second architecture's clients."""
        server = bench.start(method, specs)
        for round_index, everyone in rounds:
            uploads = bench.uploads_of(specs, seed=round_index)
            uploads = uploads if everyone else (*uploads[:2], None)
            server, _ = bench.aggregate(method, specs, server, uploads, WEIGHTS, round_index)
        return server

    with_it, without = path((0, True), (1, False), (2, True)), path((0, True), (2, True))
    of = lambda server, name: (server.inner.factors[name], server.opts["factors"][name])
    toy.assert_trees_equal(of(with_it, wide), of(without, wide))
    everyone = path((0, True), (1, True), (2, True))
    toy.assert_trees_equal(of(with_it, narrow), of(everyone, narrow))


def test_entries_that_nobody_brought_keep_value_and_momentum():
    plain = h2.hetlora(weighting="given", gamma=1.0)
    method = h2.server_optimizer(plain, optax.sgd(0.5, momentum=0.9))
    specs = bench.twins(ranks=(2, 5))
    uploads = hetlora_uploads(specs)
    first, _ = bench.aggregate(method, specs, bench.start(method, specs), uploads, WEIGHTS)
    few = hetlora_uploads(specs, seed=1)[0], None, None
    second, _ = bench.aggregate(method, specs, first, few, WEIGHTS)
    name = aggregate.architecture(specs[0])
    for of in (lambda s: s.inner.factors[name], lambda s: s.opts["factors"][name][0].trace):
        old, new = of(first), of(second)
        # Those of the round hold two columns of five.
        toy.assert_trees_equal(new["a"]["q"][:, :, 2:], old["a"]["q"][:, :, 2:])
        toy.assert_trees_equal(new["b"]["q"][:, 2:], old["b"]["q"][:, 2:])
        assert (new["a"]["q"][:, :, :2] != old["a"]["q"][:, :, :2]).all()


def hetlora_uploads(specs, seed=0):
    return tuple(HetLoraUpload(factors, None) for factors in bench.uploads_of(specs, seed=seed))


def test_columns_that_all_their_holders_have_pruned_keep_value_and_momentum():
    method = h2.server_optimizer(h2.hetlora(gamma=0.5), optax.sgd(0.5, momentum=0.9))
    (spec,) = specs = bench.twins(ranks=(3, 2))[:1]

    def after(server, seed, active):
        """A round in which every client sends the columns that are active, bool[r]."""
        (factors,) = bench.uploads_of(specs, seed=seed)
        mask = {
            part: dict.fromkeys(spec.kinds, active.reshape(shape))
            for part, shape in (("a", (1, 1, -1)), ("b", (1, -1, 1)))
        }
        sums = []
        for client in range(spec.num_clients):
            own = jax.tree.map(lambda leaf, i=client: leaf[i], factors)
            own = jax.tree.map(lambda leaf, here: jnp.where(here, leaf, 0), own, mask)
            sums.append(method.reduce(spec, HetLoraUpload(own, mask), jnp.float32(1)))
        total = (jax.tree.map(lambda *leaves: sum(leaves), *sums),)
        rest = (jnp.ones(spec.num_clients),), None, jnp.int32(0)
        return method.server_aggregate(specs, None, server, (None,), None, total, *rest)[0]

    first = after(bench.start(method, specs), 0, jnp.ones(3, bool))
    second = after(first, 1, jnp.array([True, False, False]))
    name = aggregate.architecture(spec)
    for of in (lambda s: s.inner.factors[name], lambda s: s.opts["factors"][name][0].trace):
        old, new = of(first), of(second)
        toy.assert_trees_equal(new["a"]["q"][:, :, 1:], old["a"]["q"][:, :, 1:])
        toy.assert_trees_equal(new["b"]["q"][:, 1:], old["b"]["q"][:, 1:])
        assert (new["a"]["q"][:, :, :1] != old["a"]["q"][:, :, :1]).all()
        assert float(jnp.abs(old["b"]["q"][:, 1:]).min()) > 0


def test_what_is_not_averaged_is_left_alone_or_refused():
    method = h2.server_optimizer(h2.ffa_lora(), optax.adam(0.1))
    specs = bench.twins()
    before = bench.start(method, specs)
    uploads = bench.uploads_of(specs, parts=("b",))
    after, _ = bench.aggregate(method, specs, before, uploads, WEIGHTS)
    toy.assert_trees_equal(after.inner.start, before.inner.start)
    name = aggregate.architecture(specs[0])
    assert (after.inner.factors[name]["b"]["q"] != before.inner.factors[name]["b"]["q"]).all()
    for method in (h2.local(), h2.centralised(), h2.flexlora(), h2.flora(), h2.fedex_lora()):
        with pytest.raises(h2.FederationError, match=f"{method.name!r} averages nothing"):
            h2.server_optimizer(method, optax.sgd(1.0))


def test_h2tune_takes_a_server_optimiser():
    plain = h2.h2tune(learning_rate=0.02, alternation="joint")
    specs, bases, data = toy.make_specs()[1:], toy.make_bases()[1:], toy.make_data(toy.make_specs())
    states = []
    for method in (h2.server_optimizer(plain, optax.sgd(1.0)), plain):
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        args = bases, data[1:], None, None, method.hyper
        states.append(h2.make_round(method, specs)(state, *args, toy.SEED)[0])
    toy.assert_trees_close(states[0].server.inner, states[1].server)
    toy.assert_trees_equal(states[0].clients, states[1].clients)


def test_wrappers_go_round_each_other():
    method = h2.proximal(h2.noisy(h2.fedit(), clip=1.0, multiplier=0.1), 0.01)
    assert method.hyper._fields[-3:] == ("clip", "noise_multiplier", "proximal_mu")


def test_noise_refuses_methods_that_upload_changes():
    method = h2.heterotune(size=4, widths=(3,))
    with pytest.raises(h2.FederationError, match="uploads changes"):
        h2.noisy(method, clip=1.0, multiplier=0.1)

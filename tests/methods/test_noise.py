"""Clipped and noisy uploads."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.methods.fedit import fedit
from h2tune_jax.methods.noise import _clipped, noisy

PLAIN = {
    "learning_rate": 0.02,
    "warmup_rounds": 0,
    "lambda_norm": None,
    "lambda_keep": None,
    "lambda_distil": None,
}
BASES = {
    "h2tune": lambda: h2.h2tune(**PLAIN),
    "fedavg": lambda: h2.fedavg(learning_rate=0.3),
}
CLIENTS = 3  # of the one cohort, "wide"


@functools.cache
def setup(name):
    specs = toy.make_specs(**({"targets": ()} if name == "fedavg" else {}))[1:]
    base = BASES[name]()
    wrapped = noisy(base, clip=1.0, multiplier=1.0)
    bases = toy.make_bases()[1:]
    state = h2.init_round(base, specs, bases, None, jax.random.key(11))
    state = jax.tree.map(jnp.asarray, toy.stir(state))
    rounds = {own.name: h2.make_round(own, specs, donate=False) for own in (base, wrapped)}
    args = bases, toy.make_data(specs), None, None

    def run(method, hyper, seed=5):
        return rounds[method.name](state, *args, hyper, np.uint32(seed))[0]

    return base, wrapped, state, run


def shared(method, server):
    return jax.tree.leaves([getattr(server, field) for field in method.shared])


def update(method, state, after):
    pairs = zip(shared(method, state.server), shared(method, after.server))
    return np.concatenate([np.ravel(np.asarray(b) - np.asarray(a)) for a, b in pairs])


@pytest.mark.parametrize("name", BASES)
def test_a_wide_clip_without_noise_changes_nothing(name):
    base, wrapped, _, run = setup(name)
    plain = run(base, base.hyper)
    after = run(wrapped, wrapped.hyper._replace(clip=1e6, noise_multiplier=0.0))
    toy.assert_trees_close(after.server, plain.server, rtol=1e-5, atol=1e-6)
    toy.assert_trees_equal(after.clients, plain.clients)


@pytest.mark.parametrize("name", BASES)
def test_noise_has_the_size_of_clip_times_multiplier_and_moves_no_client(name):
    base, wrapped, state, run = setup(name)
    quiet = wrapped.hyper._replace(clip=1e-3, noise_multiplier=0.0)
    still = run(wrapped, quiet)
    # A tiny clip holds the server where it is, to so much.
    assert 0 < np.linalg.norm(update(base, state, still)) <= 1e-3 * CLIENTS
    loud = wrapped.hyper._replace(clip=1e-3, noise_multiplier=1e3)
    draws = []
    for seed in range(40):
        after = run(wrapped, loud, seed)
        draws.append(update(base, still, after))
    toy.assert_trees_equal(run(wrapped, loud).clients, run(base, base.hyper).clients)
    draws = np.stack(draws)
    # A mean over all clients, each with N(0, 1) on every entry.
    z = draws * CLIENTS**0.5
    np.testing.assert_allclose(z.std(), 1, rtol=0.1)
    assert abs(z.mean()) < 4 / z.size**0.5 + 0.01


def test_clipping_by_hand():
    tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    half = _clipped(tree, jnp.asarray(2.5))
    np.testing.assert_allclose(half["a"], [1.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(half["b"], [[2.0]], rtol=1e-6)
    toy.assert_trees_equal(_clipped(tree, jnp.asarray(6.0)), tree)
    zero = jax.tree.map(jnp.zeros_like, tree)
    toy.assert_trees_equal(_clipped(zero, jnp.asarray(1.0)), zero)


def test_each_client_is_clipped_on_its_own():
    base, wrapped, state, run = setup("fedavg")
    # With one example weightless, clients' updates are longer than this clip; their mean is at most that.
    clip = 0.01
    after = run(wrapped, wrapped.hyper._replace(clip=clip, noise_multiplier=0.0))
    for a, b in zip(shared(base, state.server), shared(base, after.server)):
        assert 0 < np.linalg.norm(np.asarray(b - a)) <= clip * 1.001
    free = run(base, base.hyper)
    for a, b in zip(shared(base, state.server), shared(base, free.server)):
        assert np.linalg.norm(np.asarray(b - a)) > 2 * clip


def test_what_cannot_be_wrapped_is_refused():
    for method, message in (
        (h2.local(), "names no shared part"),
        (h2.fedra(), "uploads changes"),
        (setup("fedavg")[1], "noisy already"),
    ):
        with pytest.raises(h2.FederationError, match=message):
            noisy(method, clip=1.0, multiplier=1.0)
    for clip, multiplier in ((0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)):
        with pytest.raises(h2.FederationError):
            noisy(h2.fedavg(), clip=clip, multiplier=multiplier)


def test_the_upload_of_a_plain_lora_is_found_by_name():
    method = fedit()
    specs, bases = toy.make_specs()[1:], toy.make_bases()[1:]
    state = h2.init_round(method, specs, bases, None, jax.random.key(0))
    wrapped = noisy(method, clip=1e-9, multiplier=0.0)
    ids = (jnp.arange(1, dtype=jnp.int32),)
    download = method.broadcast(specs, jax.random.key(0), state.server, ids, state.round)[0]
    client, data = (
        jax.tree.map(lambda leaf: leaf[0], tree)
        for tree in (state.clients[0], tuple(toy.make_data(specs)[0]))
    )
    update = jax.jit(functools.partial(wrapped.client_update, specs[0]))
    args = jax.random.key(0), bases[0], client, download, h2.ClientData(*data)
    _, upload, _ = update(*args, wrapped.hyper, state.round)
    toy.assert_trees_close(upload, download.common.factors, atol=1e-8)


class Masked(NamedTuple):
    """An upload that says which entries it brings."""

    part: jax.Array
    mask: jax.Array


def test_what_an_upload_does_not_bring_is_neither_clipped_nor_noisy():
    trained = jnp.array([[3.0, 50.0], [4.0, 50.0]])
    client_update = lambda *args, drift_fn: ((), Masked(trained, jnp.array([True, False])), {})
    method = noisy(
        h2.fedavg()._replace(client_update=client_update, shared=("part",)),
        clip=2.5,
        multiplier=1.0,
    )
    args = None, jax.random.key(0), None, (), h2.Download(jnp.zeros((2, 2)), ()), None

    def send(multiplier):
        hyper = method.hyper._replace(noise_multiplier=jnp.asarray(multiplier))
        return method.client_update(*args, hyper, 0)[1].part

    # Of the first column, whose norm is 5, a half.
    np.testing.assert_allclose(send(0.0), [[1.5, 0.0], [2.0, 0.0]], rtol=1e-6)
    loud = send(1.0)
    assert (loud[:, 0] != jnp.array([1.5, 2.0])).all()
    np.testing.assert_array_equal(loud[:, 1], 0)


@pytest.mark.parametrize(
    ("rank", "pull"), [(2, 1.0), (4, -1.0)], ids=["pruned before", "pruned in this round"]
)
def test_columns_that_a_hetlora_client_has_pruned_are_no_update(rank, pull):
    """Its server holds four columns of 100; the client sends two, and all of these move by 0.1."""

    def loss_fn(adapters, base, batch, key):
        del base, batch, key
        a, b = adapters.sites["q"].a, adapters.sites["q"].b
        return -pull * (a.sum() + b.sum()) + 0 * adapters.head.sum(), {}

    spec = toy.cohort("only", width=8, depth=2, rank=4, kinds=("q",), classes=2, num_clients=1)
    budget = h2.Budget(batch_size=2, steps=1)
    spec = dataclasses.replace(spec, loss_fn=loss_fn, budget=budget)
    plain = h2.hetlora(learning_rate=0.1, optimizer=optax.identity(), gamma=0.5, lambda_tail=0.0)
    method = noisy(plain, clip=0.2, multiplier=0.0)
    common = {"a": {"q": jnp.full((2, 8, 4), 100.0)}, "b": {"q": jnp.full((2, 4, 8), 100.0)}}
    download = h2.Download(common, ())
    client = method.init_client(spec, jax.random.key(0), None, download)
    client = client._replace(rank=jnp.int32(rank))
    data = h2.ClientData({"x": jnp.zeros((2, 1))}, jnp.int32(2))
    update = jax.jit(
        lambda hyper: method.client_update(
            spec, jax.random.key(1), None, client, download, data, hyper, jnp.int32(0)
        )
    )
    after, upload, _ = update(method.hyper)
    assert int(after.rank) == 2
    # 2 layers, 2 columns of 8 and 2 rows of 8: 64 numbers, so that the update's norm is 0.8.
    step = 0.1 * 0.2 / 0.8 * pull
    _, loud, _ = update(method.hyper._replace(noise_multiplier=jnp.asarray(1.0)))
    (quiet_a, quiet_b), (loud_a, loud_b) = (
        (sent.factors["a"]["q"], sent.factors["b"]["q"]) for sent in (upload, loud)
    )
    np.testing.assert_allclose(quiet_a[:, :, :2], 100 + step, rtol=1e-6)
    np.testing.assert_allclose(quiet_b[:, :2], 100 + step, rtol=1e-6)
    for a, b in ((quiet_a, quiet_b), (loud_a, loud_b)):
        np.testing.assert_array_equal(a[:, :, 2:], 0)
        np.testing.assert_array_equal(b[:, 2:], 0)
    assert (loud_a[:, :, :2] != quiet_a[:, :, :2]).any()

"""CE-LoRA: personal means against a plain account of the rule, and what a client sends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.methods.ce_lora import CeLoraUpload, personal_mean


def everyone(seed=0, clients=5):
    """What five clients have sent, two kinds of sites; the last was not heard."""
    rng = np.random.default_rng(seed)
    cores = {kind: 0.3 * rng.normal(size=(clients, 3, 2, 2)) for kind in ("q", "up")}  # C - I
    moments, weights = rng.normal(size=(clients, 2, 4)), rng.uniform(0.5, 2, clients)
    weights[-1], moments[-1] = 0.0, 0.0
    return cores, moments, weights


@pytest.mark.parametrize("data_share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("client", [1, 4])
@pytest.mark.parametrize("tau", [0.3, 0.01])
def test_personal_means(data_share, client, tau):
    cores, moments, weights = everyone()
    learned = np.concatenate([c.reshape(5, -1) for c in cores.values()], axis=1)
    norms = np.linalg.norm(learned, axis=1)
    cosine = learned @ learned[client] / norms / norms[client]
    apart = np.square(moments - moments[client]).sum(axis=(1, 2))
    others = np.arange(5) != client
    near = np.exp(-apart / np.average(apart[others], weights=weights[others]))
    similar = (1 - data_share) * cosine + data_share * near
    if client == 4:  # not heard: like all others
        similar = np.zeros(5)
    share = weights * np.exp(similar / tau)
    expected = {kind: np.average(c, axis=0, weights=share) for kind, c in cores.items()}

    f32 = lambda leaf: jnp.asarray(leaf, jnp.float32)
    sent = CeLoraUpload(jax.tree.map(f32, cores), f32(moments) if data_share else None)
    got = personal_mean(sent, f32(weights), jnp.int32(client), data_share=data_share, tau=tau)
    for kind, mean in got.items():
        np.testing.assert_allclose(mean, expected[kind], rtol=1e-4, atol=1e-5)


def test_before_anyone_was_heard_a_client_gets_its_own():
    cores, moments, weights = everyone()
    f32 = lambda leaf: jnp.asarray(leaf, jnp.float32)
    sent = CeLoraUpload(jax.tree.map(f32, cores), f32(moments))
    got = personal_mean(sent, f32(0 * weights), jnp.int32(2), data_share=0.5, tau=0.5)
    for kind, mean in got.items():
        np.testing.assert_array_equal(mean, f32(cores[kind][2]))


def test_a_round_of_it():
    # "again" has the architecture of "wide", another task, and other clients.
    specs = toy.make_specs()
    specs = *specs, dataclasses.replace(specs[1], name="again", num_clients=2)
    bases = *toy.make_bases(), toy.make_bases()[1]
    datas = toy.make_data(toy.make_specs())
    datas = *datas, jax.tree.map(lambda leaf: leaf[:2], datas[1])
    method = h2.ce_lora(learning_rate=0.05)
    state = h2.init_round(method, specs, bases, None, jax.random.key(0))
    weights = None, jnp.asarray([1.0, 0.0, 2.0]), None
    round_fn = h2.make_round(method, specs, donate=False)
    after, metrics = round_fn(state, bases, datas, None, weights, method.hyper, toy.SEED)
    # Those who count are on the server as they left local training, with the moments of their data.
    for place in (0, 2):
        assert (after.server.latest[place].weights == 1).all()
    np.testing.assert_array_equal(after.server.latest[1].weights, [1, 0, 2])
    for kind, rows in after.server.latest[1].sent.cores.items():
        own = after.clients[1].params["c"][kind]
        np.testing.assert_array_equal(rows[jnp.asarray([0, 2])], own[jnp.asarray([0, 2])])
        np.testing.assert_array_equal(rows[1], 0)
        assert np.abs(rows[0]).max() > 0
    held = int(datas[1].num_examples[2])
    hidden = toy.layer_outputs(bases[1], datas[1].examples["x"][2, :held])[-1]
    expected = np.stack([hidden.mean(axis=0), hidden.std(axis=0)])
    moments = after.server.latest[1].sent.moments[2]
    np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-5)
    # [3, 4, 4] of one kind, and two moments of width 12.
    np.testing.assert_array_equal(metrics.clients["wide"]["numbers_up"], [48 + 24] * 3)
    np.testing.assert_array_equal(metrics.clients["wide"]["numbers_down"], [48] * 3)
    # The next download mixes both cohorts of the architecture, for each client its own way.
    ids = jnp.arange(5), jnp.arange(3), jnp.arange(2)
    sends = method.broadcast(specs, jax.random.key(0), after.server, ids, after.round)
    pooled = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *after.server.latest[1:])
    want = personal_mean(*pooled, jnp.int32(4), data_share=0.5, tau=0.5)
    np.testing.assert_allclose(sends[2].personal["q"][1], want["q"], rtol=1e-5, atol=1e-6)
    assert np.abs(sends[2].personal["q"][0] - sends[2].personal["q"][1]).max() > 0


def test_the_product_is_a_c_b():
    specs, method = toy.make_specs(), h2.ce_lora(learning_rate=0.05)
    state = toy.stir(toy.start(method, specs))
    client = jax.tree.map(lambda leaf: leaf[0], state.clients[1])
    site = method.adapters(specs[1], state.server, client, None).sites["q"]
    a, b = (leaf[0] for leaf in site.fold())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 12)), jnp.float32)
    one = jax.tree.map(lambda leaf: leaf[0], site)
    expected = x @ client.params["a"]["q"][0] @ (np.eye(4) + client.params["c"]["q"][0])
    expected = 4.0 * expected @ client.params["b"]["q"][0]
    np.testing.assert_allclose(h2.adapted(x, 0 * a @ b, one), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(4.0 * x @ a @ b, expected, rtol=1e-4, atol=1e-5)


def test_weight_decay_pulls_c_to_the_identity():
    specs = toy.make_specs(loss_fn=lambda adapters, base, batch, key: (jnp.zeros(()), {}))
    options = {"learning_rate": 0.5, "weight_decay": 0.5, "optimizer": optax.identity()}
    method = h2.ce_lora(**options, data_share=0.0)
    client = jax.tree.map(lambda leaf: leaf[0], toy.start(method, specs).clients[1])
    data = h2.ClientData({"x": jnp.zeros((4, 1))}, jnp.asarray(4))
    cores = jax.tree.map(lambda leaf: leaf + 0.8, client.params["c"])
    given = jax.random.key(1), None, client, h2.Download((), cores), data, method.hyper
    client, upload, _ = method.client_update(specs[1], *given, jnp.zeros((), jnp.int32))
    # One step takes a quarter of what is decayed.
    np.testing.assert_allclose(upload.cores["q"], 0.6, rtol=1e-6)
    site = method.adapters(specs[1], None, client, None).sites["q"]
    np.testing.assert_allclose(site.core, 0.6, rtol=1e-6)
    assert site.residual


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"data_share": 1.5}, {}, "data_share"),
        ({"temperature": 0.0}, {}, "temperature"),
        ({}, {"targets": ()}, "targets is empty"),
        ({}, {"layer_outputs_fn": None}, "layer_outputs_fn"),
    ],
)
def test_what_cannot_be_is_refused(options, changes, message):
    specs = toy.make_specs()
    if "layer_outputs_fn" in changes:
        bare = dataclasses.replace(specs[0].model, **changes)
        changes = {"model": bare}
    with pytest.raises(h2.FederationError, match=message):
        toy.start(h2.ce_lora(**options), (dataclasses.replace(specs[0], **changes), specs[1]))


def test_ranks_must_agree_within_an_architecture():
    specs = toy.make_specs()
    other = dataclasses.replace(specs[0], name="again", rank=3)
    with pytest.raises(h2.FederationError, match="cohort 'again': rank 3 differs from 2"):
        h2.init_round(h2.ce_lora(), (specs[0], other), (None, None), None, jax.random.key(0))

"""Measured gradients are those that local training steps along."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.methods.fedit import fedit
from h2tune_jax.study.norms import client_gradients, h2tune_trained, make_norms
from h2tune_jax.study.problems import quadratic

SGD = optax.identity()
PLAIN = {
    "selection": "score_frozen",
    "warmup_rounds": 0,
    "lambda_norm": None,
    "lambda_keep": None,
    "lambda_distil": None,
    # Both halves at one point, so that one step shows both gradients.
    "alternation": "jacobi",
    "optimizer": SGD,
    "learning_rate": 1.0,
}
METHODS = {
    "h2tune": (h2.h2tune(**PLAIN), h2tune_trained()),
    "h2tune-frozen": (
        h2.h2tune(**{**PLAIN, "selection": "leading"}, train_factors=False, core="pure"),
        h2tune_trained(train_factors=False),
    ),
    "h2tune-still": (
        h2.h2tune(**PLAIN, train_relation=False),
        h2tune_trained(train_relation=False),
    ),
    "fedit": (fedit(learning_rate=1.0, optimizer=SGD), None),
}


@functools.cache
def federation(name):
    """Specs whose round is one step on all examples, and a state without zeros."""
    specs = toy.make_specs(budget=h2.Budget(batch_size=10, epochs=1))
    return specs, jax.tree.map(jnp.asarray, toy.stir(toy.start(METHODS[name][0], specs)))


@functools.cache
def one_step(name, cohort):
    """Each client's gradients, its state before and after one step of rate 1, and both its messages."""
    method, trained = METHODS[name]
    specs, state = federation(name)
    base, data = toy.make_bases()[cohort], toy.make_data(specs)[cohort]
    ids = tuple(jnp.arange(spec.num_clients, dtype=jnp.int32) for spec in specs)
    download = method.broadcast(specs, jax.random.key(0), state.server, ids, state.round)[cohort]
    extra = {} if trained is None else {"trained_fn": trained}

    @jax.jit
    @jax.vmap
    def both(client_id, client, rows):
        own = h2.ClientData(*rows)
        grads = client_gradients(
            method, specs, cohort, state, base, client_id, client, own, rows=4, **extra
        )
        args = specs[cohort], jax.random.key(1), base, client, download, own
        after, upload, _ = method.client_update(*args, method.hyper, state.round)
        return grads, after, upload

    clients = state.clients[cohort]
    return (*both(ids[cohort], clients, tuple(data)), clients, download.common)


def moved(before, after):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, after)


close = functools.partial(toy.assert_trees_close, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "cohort"), [("h2tune", 0), ("h2tune", 1), ("h2tune-frozen", 0), ("h2tune-still", 1)]
)
def test_h2tune_steps_along_the_measured_gradients(name, cohort):
    grads, after, upload, before, common = one_step(name, cohort)
    specs, _ = federation(name)
    places = [h2.shared_kinds(specs).index(kind) for kind in specs[cohort].kinds]
    step = np.asarray(common.middle)[None] - np.asarray(upload.middle)
    close(np.asarray(grads.shared["middle"])[:, :, places], step)
    for field in ("a", "b", "head", "relation", "scores"):
        own = getattr(before, field)
        if own is not None:
            close(getattr(grads.personal, field), moved(own, getattr(after, field)))
    for field in ("head",) if name == "h2tune-still" else ("relation", "head"):
        assert np.abs(getattr(grads.personal, field)).max() > 1e-4


def test_fedit_steps_along_the_measured_gradients():
    grads, after, upload, before, common = one_step("fedit", 0)
    (moving,) = [part for part in grads.shared["factors"].values() if np.any(part["a"]["q"])]
    start = jax.tree.map(lambda leaf: np.asarray(leaf)[None], common.factors)
    close(moving, moved(start, upload))
    close(grads.personal.params["head"], moved(before.params["head"], after.params["head"]))
    # What is overwritten at download is not the client's own.
    assert not np.any(grads.personal.params["a"]["q"])


def test_norms_are_those_of_the_mean_over_all_clients():
    method, trained = METHODS["h2tune"]
    specs, state = federation("h2tune")
    found = [one_step("h2tune", cohort)[0] for cohort in range(2)]
    total = sum(np.asarray(grads.shared["middle"], float).sum(axis=0) for grads in found)
    squares = sum(
        (np.asarray(leaf, float) ** 2).sum()
        for grads in found
        for leaf in jax.tree.leaves(grads.personal)
    )
    losses = np.concatenate([grads.loss for grads in found])
    # Three rows of two clients at a time, of cohorts of five and three; and no dropout in sight.
    dropping = tuple(dataclasses.replace(spec, dropout=0.5) for spec in specs)
    norms_fn = make_norms(method, dropping, rows=3, chunk=2, trained_fn=trained)
    norms = jax.jit(norms_fn)(state, toy.make_bases(), toy.make_data(specs))
    np.testing.assert_allclose(norms.shared, (total**2).sum() / 8**2, rtol=2e-4)
    np.testing.assert_allclose(norms.personal, squares / 8, rtol=2e-4)
    np.testing.assert_allclose(norms.loss, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        norms.scale, np.square(np.asarray(state.server.middle)).sum(), rtol=1e-5
    )


def test_the_loss_is_the_one_that_evaluation_reports_after_download():
    method, _ = METHODS["h2tune"]
    specs, state = federation("h2tune")
    evaluate = h2.make_evaluate(method, specs, batch_size=4, moment="downloaded")
    results = evaluate(state, toy.make_bases(), toy.make_data(specs))
    for cohort, spec in enumerate(specs):
        losses = one_step("h2tune", cohort)[0].loss
        np.testing.assert_allclose(losses, results[spec.name]["loss"], rtol=1e-5)


def test_fedavg_on_a_quadratic_by_hand():
    problem = quadratic(num_clients=3, dim=2, sigma=1.0)
    known = problem.solution
    method = h2.fedavg()
    state = h2.init_round(method, problem.specs, problem.bases, None, jax.random.key(0))
    norms = make_norms(method, problem.specs, rows=1)(state, problem.bases, problem.data)
    grad = (known.curvatures * (known.start - known.centres)).mean(axis=0)
    np.testing.assert_allclose(norms.shared, (grad**2).sum(), rtol=1e-5)
    assert norms.personal == 0


def test_what_h2tune_trains():
    specs, state = federation("h2tune")
    client = jax.tree.map(lambda leaf: leaf[0], state.clients[1])
    ones = jax.tree.map(jnp.ones_like, client)
    zeros = lambda tree: not any(np.any(leaf) for leaf in jax.tree.leaves(tree))
    seen = h2tune_trained()(specs[1], client, ones)
    np.testing.assert_array_equal(seen.relation, np.asarray(client.relation) != 0)
    assert not zeros((seen.a, seen.b, seen.head))
    # Under `transpose` P gets no task gradient.
    assert zeros(h2tune_trained(upload="transpose")(specs[1], client, ones).relation)
    frozen = h2tune_trained(train_factors=False)(specs[1], client, ones)
    assert zeros((frozen.a, frozen.b))
    assert not zeros(frozen.head)
    still = h2tune_trained(train_relation=False)(specs[1], client, ones)
    assert zeros(still.relation)
    assert not zeros((still.a, still.b, still.head))


def test_what_no_field_of_the_server_shows_is_refused():
    method = METHODS["fedit"][0]._replace(shared=())
    with pytest.raises(h2.FederationError, match="shares something"):
        make_norms(method, federation("fedit")[0], rows=4)

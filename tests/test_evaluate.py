"""Evaluation counts every client's own examples once, whoever stands beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import h2tune_jax as h2

METHOD = h2.local(learning_rate=0.05)


@pytest.fixture(scope="module")
def setting():
    specs = toy.make_specs()
    return specs, toy.stir(toy.start(METHOD, specs)), toy.make_data(specs, size=10)


def by_hand(specs, state, data, cohort, client):
    """The mean over a client's own examples, all in one batch."""
    row = jax.tree.map(lambda leaf: leaf[client], (state.clients[cohort], data[cohort].examples))
    count = int(data[cohort].num_examples[client])
    adapters = METHOD.adapters(specs[cohort], state.server, row[0], None)
    examples = jax.tree.map(lambda leaf: leaf[:count], row[1])
    batch = h2.Batch(examples, jnp.ones(count, bool))
    loss, metrics = specs[cohort].loss_fn(adapters, toy.make_bases()[cohort], batch, None)
    return float(loss), float(metrics["accuracy"])


@pytest.mark.parametrize("batch_size", [3, 4, 16])
def test_clients_with_fewer_batches_than_others_are_not_counted_twice(setting, batch_size):
    specs, state, data = setting
    held = jnp.asarray([10, 8, 4, 3, 1], jnp.int32)
    data = data[0]._replace(num_examples=held), data[1]
    found = h2.make_evaluate(METHOD, specs, batch_size=batch_size)(state, toy.make_bases(), data)
    for client in range(5):
        loss, accuracy = by_hand(specs, state, data, 0, client)
        np.testing.assert_allclose(found["narrow"]["loss"][client], loss, rtol=2e-5)
        np.testing.assert_allclose(found["narrow"]["accuracy"][client], accuracy, rtol=1e-6)


def test_some_clients_alone_get_what_they_get_among_all(setting):
    specs, state, data = setting
    everyone = h2.make_evaluate(METHOD, specs, batch_size=4)(state, toy.make_bases(), data)
    ids = np.asarray([4, 1], np.int32)
    some = state._replace(clients=(jax.tree.map(lambda leaf: leaf[ids], state.clients[0]), None))
    rows = jax.tree.map(lambda leaf: leaf[ids], data[0]), None
    evaluate = h2.make_evaluate(METHOD, specs, batch_size=4)
    found = evaluate(some, toy.make_bases(), rows, (jnp.asarray(ids), jnp.asarray(ids[:0])))
    assert set(found) == {"narrow"}
    for metric, values in found["narrow"].items():
        np.testing.assert_allclose(values, everyone["narrow"][metric][ids], rtol=1e-6)


def test_the_wrong_number_of_clients_is_refused(setting):
    specs, state, data = setting
    evaluate = h2.make_evaluate(METHOD, specs, batch_size=4)
    ids = jnp.zeros(2, jnp.int32), jnp.zeros(3, jnp.int32)
    with pytest.raises(h2.FederationError, match=r"cohort .narrow.: .* must lead with"):
        evaluate(state, toy.make_bases(), data, ids)

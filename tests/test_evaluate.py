"""Evaluation counts every client's own examples once, whoever stands beside it."""

import dataclasses

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


@pytest.mark.parametrize("axis", ["scan", "vmap"])
def test_a_client_without_examples_is_not_measured(setting, axis):
    specs, state, data = setting
    evaluate = h2.make_evaluate(METHOD, specs, batch_size=4, client_axis=axis)
    full = evaluate(state, toy.make_bases(), data)
    held = data[0].num_examples.at[jnp.asarray([1, 4])].set(0)
    none = jnp.zeros_like(data[1].num_examples)
    data = data[0]._replace(num_examples=held), data[1]._replace(num_examples=none)
    found = evaluate(state, toy.make_bases(), data)
    for metric in ("loss", "accuracy"):
        np.testing.assert_array_equal(
            np.isnan(found["narrow"][metric]), [False, True, False, False, True]
        )
        for client in (0, 2, 3):
            assert found["narrow"][metric][client] == full["narrow"][metric][client]
        assert np.isnan(found["wide"][metric]).all()


def test_a_client_takes_its_own_batches_and_no_more(setting):
    specs, state, data = setting
    batches = []

    def counting(adapters, base, batch, key):
        jax.debug.callback(lambda mask: batches.append(int(mask.sum())), batch.mask)
        return toy.loss_fn(adapters, base, batch, key)

    specs = tuple(dataclasses.replace(spec, loss_fn=counting) for spec in specs)
    data = data[0]._replace(num_examples=jnp.asarray([10, 8, 4, 3, 0], jnp.int32)), None
    ids = jnp.arange(5, dtype=jnp.int32), jnp.zeros(0, jnp.int32)
    evaluate = h2.make_evaluate(METHOD, specs, batch_size=4, client_axis="scan")
    evaluate(state, toy.make_bases(), data, ids)
    jax.effects_barrier()
    assert batches == [4, 4, 2, 4, 4, 4, 3]


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

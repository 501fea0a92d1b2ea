"""All data in one place: what is pooled, how long the server trains on it, and with what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.methods.centralised import pool


def test_pooling_puts_examples_first_and_padding_last():
    x = jnp.asarray([[[1], [2], [9]], [[3], [9], [9]], [[9], [9], [9]]])
    pooled = pool(h2.ClientData({"x": x}, jnp.asarray([2, 1, 0], jnp.int32)))
    assert pooled.num_examples == 3
    np.testing.assert_array_equal(pooled.examples["x"][:3, 0], [1, 2, 3])


def quadratic(adapters, base, batch, key):
    """0.5 |w - mean x|^2: one step of gradient descent is known by hand."""
    del base, key
    mask = batch.mask.astype(jnp.float32)
    mean = (batch.examples["x"][:, 0] * mask).sum() / mask.sum()
    return 0.5 * jnp.square(adapters.head - mean), {}


def federation(budget):
    spec = toy.cohort("only", width=4, depth=1, rank=1, kinds=("q",), classes=2, num_clients=4)
    spec = dataclasses.replace(
        spec, loss_fn=quadratic, init_head_fn=lambda key: jnp.zeros(()), budget=budget
    )
    x = jnp.asarray([[[1.0], [2.0]], [[6.0], [-50.0]], [[100.0], [100.0]], [[7.0], [7.0]]])
    return spec, h2.ClientData({"x": x}, jnp.asarray([2, 1, 2, 0], jnp.int32))


def test_training_that_overflows_changes_nothing():
    import optax

    spec, data = federation(h2.Budget(batch_size=8, steps=4))
    method = h2.centralised(optimizer=optax.trace(0.9), optimizer_state="kept", learning_rate=0.5)
    first = h2.init_round(method, (spec,), (None,), None, jax.random.key(0))
    round_fn = h2.make_round(method, (spec,), donate=False)
    rest = lambda hyper: ((None,), (data,), None, None, hyper, toy.SEED)
    wild = method.hyper._replace(head_rate=jnp.float32(1e30))
    state, metrics = round_fn(first, *rest(wild))
    assert not np.isfinite(metrics.server["loss"]["only"])
    toy.assert_trees_equal(state.server, first.server)
    state, _ = round_fn(state, *rest(method.hyper))
    assert float(state.server.params["only"]["head"]) != 0


@pytest.mark.parametrize(
    ("budget", "steps", "option"),
    [
        (h2.Budget(batch_size=8, epochs=2), 2, "all"),
        (h2.Budget(batch_size=8, steps=2), 4, "all"),  # of the two clients that count
        (h2.Budget(batch_size=8, steps=2), 2, "one"),
    ],
)
def test_the_server_trains_on_what_counts_for_as_long_as_the_budget_says(budget, steps, option):
    import optax

    spec, data = federation(budget)
    method = h2.centralised(optimizer=optax.identity(), learning_rate=0.5, budget=option)
    state = h2.init_round(method, (spec,), (None,), None, jax.random.key(0))
    weights = (jnp.asarray([1.0, 1.0, 0.0, 1.0]),)  # the third's data stay out, the last has none
    args = (None,), (data,), None, weights, method.hyper
    state, metrics = h2.make_round(method, (spec,))(state, *args, toy.SEED)
    # All three examples that count are one batch with mean 3; each step halves the distance to it.
    np.testing.assert_allclose(state.server.params["only"]["head"], 3 * (1 - 0.5**steps), rtol=1e-6)
    seen = metrics.clients["only"]
    np.testing.assert_array_equal(seen["numbers_up"], [2, 1, 2, 0])  # one number an example
    np.testing.assert_array_equal(seen["steps"], 0)
    np.testing.assert_allclose(seen["loss"], [0.5 * 1.5**2, 18.0, 5000.0, 0.0])  # of the download
    assert np.isfinite(metrics.server["loss"]["only"])


def test_the_server_trains_with_the_settings_of_the_round():
    import optax

    spec, data = federation(h2.Budget(batch_size=8, epochs=1))
    method = h2.centralised(optimizer=optax.identity(), learning_rate=0.5)
    state = h2.init_round(method, (spec,), (None,), None, jax.random.key(0))
    weights = (jnp.asarray([0.0, 1.0, 0.0, 0.0]),)
    hyper = method.hyper._replace(head_rate=jnp.asarray(0.25))
    args = (None,), (data,), None, weights, hyper
    state, _ = h2.make_round(method, (spec,))(state, *args, toy.SEED)
    np.testing.assert_allclose(state.server.params["only"]["head"], 0.25 * 6)

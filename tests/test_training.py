"""Descent and schedules by hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import h2tune_jax as h2
from h2tune_jax.training import cosine_schedule, descend, run_steps


def test_descent_by_hand():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([10.0]), "none": None}
    grads = {"a": jnp.array([0.5, -1.0]), "b": jnp.array([1.0]), "none": None}
    rates = {"a": jnp.float32(0.1), "b": jnp.float32(1.0), "none": jnp.float32(1.0)}
    optimizer = optax.identity()
    moved, _ = descend(optimizer, grads, optimizer.init(params), params, rates)
    np.testing.assert_allclose(moved["a"], [0.95, 2.1])
    np.testing.assert_allclose(moved["b"], [9.0])
    moved, _ = descend(
        optimizer, grads, optimizer.init(params), params, rates,
        decay={"a": jnp.float32(0.5), "b": None, "none": None},
        keep={"a": jnp.array([True, False]), "b": None, "none": None},
    )  # fmt: skip
    # a[0]: 1 - 0.1 * (0.5 + 0.5 * 1); a[1] is held; b has no decay.
    np.testing.assert_allclose(moved["a"], [0.9, 2.0])
    np.testing.assert_allclose(moved["b"], [9.0])


def test_stale_moments_do_not_move_what_is_held():
    params = {"g": jnp.array([1.0, 1.0])}
    optimizer = optax.scale_by_adam()
    opt = optimizer.init(params)
    rate = jnp.float32(0.1)
    params, opt = descend(optimizer, {"g": jnp.array([1.0, 1.0])}, opt, params, rate)
    held = params["g"][1]
    keep = {"g": jnp.array([True, False])}
    for _ in range(3):
        grads = {"g": jnp.array([1.0, 0.0])}
        params, opt = descend(optimizer, grads, opt, params, rate, keep=keep)
    assert params["g"][1] == held
    assert params["g"][0] < held


def test_descent_matches_optax_adamw():
    params = jax.random.normal(jax.random.key(0), (5,))
    ours, reference = params, params
    direction, adamw = optax.scale_by_adam(b2=0.95), optax.adamw(1e-2, b2=0.95, weight_decay=0.1)
    opt, reference_opt = direction.init(ours), adamw.init(reference)
    for step in range(4):
        grads = jax.random.normal(jax.random.key(step + 1), (5,))
        ours, opt = descend(direction, grads, opt, ours, jnp.float32(1e-2), decay=jnp.float32(0.1))
        with jax.numpy_dtype_promotion("standard"):
            updates, reference_opt = adamw.update(grads, reference_opt, reference)
        reference = optax.apply_updates(reference, updates)
    np.testing.assert_allclose(ours, reference, rtol=1e-6)


@pytest.mark.parametrize("held", [1, 7, 10, 11])
def test_a_budget_of_steps_visits_the_examples_as_one_of_epochs_does(held):
    data = h2.ClientData(jnp.arange(11), jnp.int32(held))
    per_epoch = -(-held // 3)

    def visited(**budget):
        def step_fn(seen, batch, key, step, num_steps):
            row = jnp.where(batch.mask, batch.examples, -1)
            return seen.at[step].set(row), {}

        budget = h2.Budget(batch_size=3, **budget)
        nothing = jnp.full((3 * per_epoch, 3), -2)
        seen, metrics = run_steps(budget, jax.random.key(1), data, nothing, step_fn)
        return np.asarray(seen), int(metrics["steps"])

    of_epochs, steps = visited(epochs=3)
    assert steps == 3 * per_epoch
    for seen in np.split(of_epochs, 3):
        assert sorted(seen[seen >= 0]) == list(range(held))
    # The last epoch is broken off one step before its end.
    of_steps, steps = visited(steps=3 * per_epoch - 1)
    np.testing.assert_array_equal(of_steps[:steps], of_epochs[:steps])
    assert (of_steps[steps:] == -2).all()


def test_cosine_schedule():
    schedule = cosine_schedule(warmup=0.2)
    paces = [float(schedule(jnp.int32(step), jnp.int32(10))) for step in range(11)]
    assert paces[0] == 0
    assert paces[1] == 0.5
    np.testing.assert_allclose(paces[2], 1.0)
    np.testing.assert_allclose(paces[6], 0.5, atol=1e-6)
    np.testing.assert_allclose(paces[10], 0.0, atol=1e-6)
    flat = cosine_schedule()
    assert float(flat(jnp.int32(0), jnp.int32(3))) == 1

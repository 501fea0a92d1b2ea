"""Descent and schedules by hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import h2tune_jax as h2
from h2tune_jax.training import check_optimizer, cosine_schedule, descend, run_steps


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


@pytest.mark.parametrize(
    "make", [h2.local, h2.h2tune, h2.fedavg, h2.fed_hello], ids=lambda make: make.__name__
)
@pytest.mark.parametrize("optimizer", [optax.adam(1.0), optax.sgd(0.1, momentum=0.9)])
def test_an_optimizer_with_a_rate_of_its_own_is_refused(make, optimizer):
    with pytest.raises(h2.FederationError, match="optimizer: has a learning rate of its own"):
        make(optimizer=optimizer)


def test_an_optimizer_without_a_rate_is_refused_at_the_server():
    with pytest.raises(h2.FederationError, match="server_optimizer: the transformation has no"):
        h2.server_optimizer(h2.fedit(), optax.scale_by_adam())


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.identity(),
        optax.trace(0.9),
        optax.scale_by_lion(),
        optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()),
        optax.chain(optax.add_noise(100.0, 0.0, 0), optax.scale_by_sign()),
        optax.chain(optax.scale_by_factored_rms(), optax.add_decayed_weights(0.1)),
        optax.multi_transform({"a": optax.identity()}, {"mine": "a"}),  # cannot be asked
    ],
)
def test_optimizers_that_descend_are_taken(optimizer):
    check_optimizer(optimizer)


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


def visited(held, *, times=None, room=11, most=40, **budget):
    """Return the examples that each step reads, -1 where a row does not count, and -2 after the last."""

    def step_fn(seen, batch, key, step, num_steps):
        return seen.at[step].set(jnp.where(batch.mask, batch.examples, -1)), {}

    data = h2.ClientData(jnp.arange(room), jnp.asarray(held))
    budget = h2.Budget(batch_size=3, **budget)
    nothing = jnp.full((most, 3), -2)
    seen, metrics = run_steps(budget, jax.random.key(1), data, nothing, step_fn, times=times)
    return seen, metrics["steps"]


def test_a_metric_that_is_true_or_false_has_a_mean():
    data = h2.ClientData(jnp.arange(8), jnp.asarray(8))
    step_fn = lambda carry, batch, *rest: (carry, {"hit": batch.examples[0] == 5})
    budget = h2.Budget(batch_size=1, epochs=1)
    _, metrics = run_steps(budget, jax.random.key(1), data, (), step_fn)
    assert metrics["hit"] == 0.125


@pytest.mark.parametrize("held", [1, 7, 10, 11])
def test_a_budget_of_steps_visits_the_examples_as_one_of_epochs_does(held):
    per_epoch = -(-held // 3)
    of_epochs, steps = visited(held, epochs=3)
    assert steps == 3 * per_epoch
    epochs = np.split(np.asarray(of_epochs)[:steps], 3)
    for seen in epochs:
        assert sorted(seen[seen >= 0]) == list(range(held))
    if held > 6:
        assert not np.array_equal(epochs[0], epochs[1])
    # The last epoch is broken off one step before its end.
    of_steps, steps = visited(held, steps=3 * per_epoch - 1)
    np.testing.assert_array_equal(of_steps[:steps], of_epochs[:steps])
    assert (np.asarray(of_steps)[steps:] == -2).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_clients_that_run_side_by_side_begin_their_epochs_each_at_its_own_step(shuffle):
    held = jnp.asarray([1, 7, 0, 11, 6])
    run = lambda count: visited(count, steps=9, shuffle=shuffle)
    together, steps = jax.vmap(run)(held)
    np.testing.assert_array_equal(steps, [9, 9, 0, 9, 9])
    for row, count in zip(together, held):
        np.testing.assert_array_equal(row, run(count)[0])


def test_a_budget_of_steps_can_be_multiplied_and_one_of_epochs_means_as_many():
    once, steps = visited(7, steps=9)
    assert steps == 9
    thrice, steps = jax.jit(lambda times: visited(7, steps=3, times=times))(jnp.int32(3))
    assert steps == 9
    np.testing.assert_array_equal(thrice, once)
    _, steps = visited(7, epochs=2, times=jnp.int32(3))
    assert steps == 6


@pytest.mark.parametrize("budget", [{"epochs": 2}, {"steps": 9}])
def test_examples_are_sorted_once_an_epoch(budget):
    """A client's loop has no sort that every step goes through."""
    jaxpr = str(jax.make_jaxpr(lambda held: visited(held, **budget))(jnp.int32(7)))
    assert jaxpr.count(" sort[") == 1
    where = jaxpr.index(" sort[")
    if "steps" in budget:
        assert "cond[" in jaxpr[:where]
    else:
        assert "while[" not in jaxpr[:where]


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

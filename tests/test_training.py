"""Descent and schedules by hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from h2tune_jax.training import cosine_schedule, descend


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

"""DeMA against its definition branch by branch, and block adapters in the models that carry them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from tiny import classify_fn, tiny_base

import h2tune_jax as h2
from h2tune_jax.adapters import dema


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def mixture(layers, width, size=3, hidden=5, seed=0, **fields):
    """A mixture of every layer with nothing at zero."""
    parts = {
        "down": (layers, width, size),
        "inner": (layers, size, hidden),
        "outer": (layers, hidden, size),
        "up": (layers, size, width),
    }
    arrays = {
        name: jnp.asarray(draw(seed + i, *shape), jnp.float32)
        for i, (name, shape) in enumerate(parts.items())
    }
    return dema.Dema(**arrays, **fields)


def test_branches_side_by_side_are_their_sum():
    gelu = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))
    x, down, up = draw(0, 7, 6), draw(1, 6, 3), draw(2, 3, 6)
    inner, outer = draw(3, 3, 5), draw(4, 5, 3)
    hidden = x @ down
    branches = [(inner[:, :2], outer[:2]), (inner[:, 2:], outer[2:])]
    expected = sum(gelu(hidden @ first) @ second for first, second in branches) @ up
    f32 = lambda a: jnp.asarray(a, jnp.float32)
    adapter = dema.Dema(down=f32(down), inner=f32(inner), outer=f32(outer), up=f32(up))
    np.testing.assert_allclose(adapter(f32(x)), expected, rtol=2e-5, atol=2e-5)


def test_a_fresh_mixture_adds_nothing_and_every_part_can_learn():
    inner, outer = dema.init_branches(jax.random.key(0), 2, 4, (3, 2), jnp.float32)
    assert inner.shape == (2, 4, 5)
    assert outer.shape == (2, 5, 4)
    down, up = dema.init_projections(jax.random.key(1), 2, 6, 4, jnp.float32)
    fresh = dema.Dema(down=down[0], inner=inner[0], outer=outer[0], up=up[0])
    x = jnp.asarray(draw(2, 5, 6), jnp.float32)
    np.testing.assert_array_equal(fresh(x), 0)
    grads = jax.grad(lambda adapter: (adapter(x) * x).sum())(fresh)
    assert np.abs(grads.up).max() > 0
    # Each branch is drawn as it would be alone, whatever others stand beside it.
    alone, _ = dema.init_branches(jax.random.key(0), 2, 4, (3,), jnp.float32)
    np.testing.assert_array_equal(inner[:, :, :3], alone)


def test_dropout_needs_a_key():
    adapter = jax.tree.map(lambda leaf: leaf[0], mixture(1, 6, dropout=0.5))
    x = jnp.asarray(draw(9, 4, 6), jnp.float32)
    np.testing.assert_array_equal(adapter(x), adapter(x))
    assert np.abs(adapter(x, jax.random.key(0)) - adapter(x)).max() > 0.1


def test_beside_a_strangers_block_by_hand():
    base = toy.init_base(1, 8, 2, ("q",))
    examples = {"x": jnp.asarray(draw(1, 4, toy.INPUT), jnp.float32), "y": jnp.zeros(4, jnp.int32)}
    batch, head = h2.Batch(examples, jnp.ones(4, bool)), jnp.asarray(draw(2, 8, 3), jnp.float32)
    adapter = mixture(2, 8)
    _, metrics = toy.loss_fn(h2.Adapters({"block": adapter}, head), base, batch, None)
    hidden = jnp.tanh(examples["x"] @ base["embed"])
    for layer in range(2):
        beside = jax.tree.map(lambda leaf, at=layer: leaf[at], adapter)
        hidden = hidden + jnp.tanh(hidden @ base["q"][layer]) + beside(hidden)
    np.testing.assert_allclose(metrics["logits"], hidden @ head, rtol=1e-5, atol=1e-5)


def classify(arch, sites):
    model, base = tiny_base(arch)
    rng = np.random.default_rng(0)
    if model.config.image_size:
        batch = {"pixel_values": jnp.asarray(rng.normal(size=(2, 3, 12, 12)), jnp.float32)}
    else:
        batch = {"input_ids": jnp.asarray(rng.integers(3, 60, (2, 6)), jnp.int32)}
    return classify_fn(arch)(base, sites, model.init_head_fn(4)(jax.random.key(5)), batch)


@pytest.mark.parametrize("arch", ["bert", "gpt2", "gemma2", "vit"])
def test_every_family_adds_it_beside_each_block(arch):
    model = tiny_base(arch)[0]
    adapter = mixture(model.config.num_layers, model.spec.width)
    plain = classify(arch, {})
    silent = jax.tree.map(jnp.zeros_like, adapter)
    np.testing.assert_array_equal(classify(arch, {"block": silent}), plain)
    for layer in range(model.config.num_layers):
        only = jax.tree.map(lambda leaf, at=layer: leaf * 0 + leaf.at[:at].set(0), adapter)
        only = jax.tree.map(lambda leaf, at=layer: leaf.at[at + 1 :].set(0), only)
        assert np.abs(classify(arch, {"block": only}) - plain).max() > 1e-3


def test_reading_on_with_a_cache_keeps_it():
    model, base = tiny_base("gpt2")
    sites = {"block": mixture(model.config.num_layers, model.spec.width)}
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 60, (2, 6)), jnp.int32)
    whole = model.hidden_fn(base, sites, {"input_ids": ids})
    cache = model.init_cache_fn(2, 6)
    _, cache = model.step_fn(base, sites, {"input_ids": ids[:, :4]}, cache)
    rest, _ = model.step_fn(base, sites, {"input_ids": ids[:, 4:]}, cache)
    np.testing.assert_allclose(rest, whole[:, 4:], rtol=1e-4, atol=1e-4)

"""A pair of the client's own beside a core in a frozen basis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2tune_jax.adapters.parallel import ParallelSite


def draw(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.fixture
def site():
    rng = np.random.default_rng(0)
    return ParallelSite(
        a=draw(rng, 5, 2), b=draw(rng, 2, 3), u=draw(rng, 5, 4), core=draw(rng, 4, 4),
        v=draw(rng, 4, 3), scale=2.5,
    )  # fmt: skip


def test_both_products_by_the_definition(site):
    x = np.random.default_rng(1).normal(size=(7, 5))
    a, b, u, core, v = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(site))
    expected = 2.5 * x @ a @ b + x @ u @ core @ v
    np.testing.assert_allclose(site.update(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)


def test_it_goes_out_as_one_pair(site):
    a, b = site.fold()
    assert (a.shape, b.shape) == ((5, 6), (6, 3))
    x = draw(np.random.default_rng(1), 7, 5)
    np.testing.assert_allclose(2.5 * (x @ a) @ b, site.update(x), rtol=1e-4)


def test_dropout_drops_the_input_of_both(site):
    site = dataclasses.replace(site, dropout=0.5)
    x, key = jnp.ones((1, 5)), jax.random.key(3)
    kept = jax.random.bernoulli(key, 0.5, x.shape)
    whole = dataclasses.replace(site, dropout=0.0)
    np.testing.assert_allclose(
        site.update(x, key), whole.update(jnp.where(kept, 2.0, 0.0)), rtol=1e-6
    )
    np.testing.assert_array_equal(site.update(x), whole.update(x))

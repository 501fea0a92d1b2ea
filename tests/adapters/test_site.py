"""The adapted product: what a model sees of its adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import h2tune_jax as h2

KEYS = jax.random.split(jax.random.key(0), 6)
X, W, A, T, B, BIAS = (
    jax.random.normal(k, s) for k, s in zip(KEYS, [(5, 6), (6, 4), (6, 3), (3, 3), (3, 4), (4,)])
)


def adapter(**changes):
    return h2.SiteAdapter(**{"a": A, "core": T, "b": B, "scale": 0.5, **changes})


def delta(core):
    return 0.5 * A @ core @ B


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (None, X @ W),
        (adapter(), X @ (W + delta(jnp.eye(3) + T))),
        (adapter(residual=False), X @ (W + delta(T))),
        (adapter(core=None), X @ (W + delta(jnp.eye(3)))),
    ],
)
def test_product(site, expected):
    np.testing.assert_allclose(h2.adapted(X, W, site), expected, rtol=1e-4, atol=1e-5)
    with_bias = jax.vmap(lambda x: h2.adapted(x, W, site, bias=BIAS))(X)
    np.testing.assert_allclose(with_bias, expected + BIAS[None], rtol=1e-4, atol=1e-5)
    if site is not None:
        a, b = site.fold()
        np.testing.assert_allclose(X @ (W + 0.5 * a @ b), expected, rtol=1e-4, atol=1e-5)


def test_dropout_thins_the_adapters_input_and_not_the_base():
    site = adapter(dropout=0.5)
    np.testing.assert_array_equal(h2.adapted(X, W, site), h2.adapted(X, W, adapter()))
    draws = jax.vmap(lambda key: h2.adapted(X, W, site, key=key))
    products = draws(jax.random.split(jax.random.key(1), 4000))
    assert (products[0] != products[1]).any()
    # In the mean it is the product itself.
    np.testing.assert_allclose(products.mean(axis=0), h2.adapted(X, W, adapter()), atol=0.25)
    nothing = adapter(dropout=0.5, b=jnp.zeros_like(B))
    np.testing.assert_allclose(h2.adapted(X, W, nothing, key=KEYS[0]), X @ W, rtol=1e-6)


def test_scanning_over_layers_strips_the_layer_axis():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), adapter())
    assert stacked.scale == 0.5
    _, products = jax.lax.scan(lambda c, site: (c, h2.adapted(X, W, site)), None, stacked)
    np.testing.assert_allclose(products[0], h2.adapted(X, W, adapter()), rtol=1e-6)


def test_an_explicit_kernel_that_cannot_be_had_is_an_error():
    with pytest.raises((RuntimeError, NotImplementedError), match="triton"):
        jax.jit(lambda x: h2.adapted(x, W, adapter(kernels="triton")))(X)
    with pytest.raises(h2.FederationError, match="plain LoRA has no core"):
        h2.adapted(X, W, adapter(core=None, kernels="triton"))

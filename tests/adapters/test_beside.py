"""What a server has folded in beside a frozen weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_base

import h2tune_jax as h2
from h2tune_jax.adapters.beside import Beside, add, total
from h2tune_jax.models.families import family_of
from h2tune_jax.models.tensors import get_leaf


def site_of(rng, *, core=False, d=6, f=5, dtype=jnp.float32, kernels="auto"):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    folded = Beside(dense=draw(3, d, f), u=draw(3, d, 4), v=draw(3, 4, f))
    middle = draw(3, 2, 2) if core else None
    return h2.SiteAdapter(
        a=draw(3, d, 2), core=middle, b=draw(3, 2, f), beside=folded, scale=2.0, kernels=kernels
    )


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
def test_the_product_is_that_of_the_sum(core, shape):
    rng = np.random.default_rng(0)
    site = site_of(rng, core=core, d=shape[0], f=shape[1])
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, shape[0]), shape))
    exact = lambda leaf: np.asarray(leaf, np.float64)
    middle = np.eye(2) + (exact(site.core) if core else 0)
    whole = exact(site.beside.dense) + exact(site.beside.u) @ exact(site.beside.v)
    whole = whole + 2.0 * exact(site.a) @ middle @ exact(site.b)
    for layer in range(3):
        one = jax.tree.map(lambda leaf, i=layer: leaf[i], site)
        expected = exact(x) @ (exact(w) + whole[layer])
        np.testing.assert_allclose(h2.adapted(x, w, one), expected, rtol=1e-5, atol=1e-5)
    a, b = site.fold()  # an ordinary pair with the same product
    np.testing.assert_allclose(2.0 * exact(a) @ exact(b), whole, rtol=1e-5, atol=1e-5)
    assert a.shape[-1] == b.shape[-2] == min(shape) + 2


def test_a_small_delta_is_not_lost_in_16_bits():
    w, x = jnp.ones((2, 2), jnp.bfloat16), jnp.asarray([[1.0, -1.0]], jnp.bfloat16)
    small = jnp.asarray([[[2e-3, 0], [0, 0]]])
    none = Beside(dense=small, u=jnp.zeros((1, 2, 1)), v=jnp.zeros((1, 1, 2)))
    zero = jnp.zeros((1, 2, 1)), jnp.zeros((1, 1, 2))
    site = h2.SiteAdapter(a=zero[0], core=None, b=zero[1], beside=none, scale=1.0)
    y = h2.adapted(x, w, jax.tree.map(lambda leaf: leaf[0], site))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), [[2e-3, 0]], rtol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_of_it_is_what_a_client_had(dtype):
    rng = np.random.default_rng(4)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    folded = Beside(dense=draw(2, 6, 5), u=draw(2, 6, 3), v=draw(2, 3, 5))
    x, w = draw(4, 6).astype(dtype), draw(6, 5).astype(dtype)
    exact = lambda leaf: np.asarray(leaf, np.float64)
    for has in ([1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]):
        part = jnp.broadcast_to(jnp.asarray(has, bool), (2, 4))
        some = dataclasses.replace(folded, part=part)
        columns = exact(folded.u) * np.asarray(has[:3]) @ exact(folded.v)
        expected = exact(folded.dense) * has[3] + columns
        np.testing.assert_allclose(total(some), expected, rtol=1e-5, atol=1e-5)
        one = jax.tree.map(lambda leaf: leaf[1], some)
        y, whole = add(x, w, one), exact(x) @ (exact(w) + expected[1])
        assert y.dtype == dtype
        rounding = 1e-5 if dtype == "float32" else 0.1
        np.testing.assert_allclose(exact(y), whole, rtol=rounding, atol=rounding)
    alone = Beside(dense=folded.dense)
    np.testing.assert_array_equal(total(alone), folded.dense)
    np.testing.assert_allclose(
        add(x, w, jax.tree.map(lambda leaf: leaf[0], alone)).astype(jnp.float32),
        exact(x) @ (exact(w) + exact(folded.dense[0])),
        rtol=rounding,
        atol=rounding,
    )


def test_dropout_is_of_the_adapters_input_alone():
    rng = np.random.default_rng(1)
    site = dataclasses.replace(site_of(rng), dropout=0.5)
    one = jax.tree.map(lambda leaf: leaf[0], dataclasses.replace(site, b=0 * site.b))
    x, w = jnp.ones((4, 6)), jnp.ones((6, 5))
    dropped = h2.adapted(x, w, one, key=jax.random.key(0))
    np.testing.assert_allclose(dropped, x @ (w + total(site.beside)[0]), rtol=1e-5)


def test_kernels_that_must_be_are_refused():
    rng = np.random.default_rng(2)
    one = jax.tree.map(lambda leaf: leaf[0], site_of(rng, core=True, kernels="triton"))
    with pytest.raises(h2.FederationError, match="beside the base"):
        h2.adapted(jnp.ones((1, 6)), jnp.ones((6, 5)), one)


def test_models_carry_it_to_every_site():
    model, base = tiny_base("llama")
    rng, sites = np.random.default_rng(3), {}
    merged = base
    for kind in ("q", "down"):
        d, f = model.spec.shapes[kind]
        draw = lambda *shape: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)
        folded = Beside(dense=draw(2, d, f), u=draw(2, d, 3), v=draw(2, 3, f))
        sites[kind] = h2.SiteAdapter(
            a=draw(2, d, 2), core=None, b=0 * draw(2, 2, f), beside=folded, scale=1.0
        )
        path = ("layers", *family_of(model.config).sites[kind][0], "w")
        merged = put(merged, path, get_leaf(base, path) + total(folded))
    inputs = {"input_ids": jnp.asarray([[5, 6, 7, 8]], jnp.int32)}
    run = jax.jit(model.hidden_fn)
    np.testing.assert_allclose(
        run(base, sites, inputs), run(merged, None, inputs), rtol=1e-4, atol=1e-4
    )
    assert np.abs(run(base, sites, inputs) - run(base, None, inputs)).max() > 0.1


def put(tree, path, leaf):
    return {**tree, path[0]: leaf if len(path) == 1 else put(tree[path[0]], path[1:], leaf)}

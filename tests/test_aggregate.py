"""Server maths: linear, permutation-invariant, exact for equal clients, masked entry by entry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import server as bench
from hypothesis import given, settings
from hypothesis import strategies as st

from h2tune_jax import aggregate


def masked_mean(values, weights, previous, masks=None):
    """The mean as the engine makes it: every client's part, their sum, the division."""
    part = (
        aggregate.weighted_part(v, w) if masks is None else aggregate.weighted_part(v, w, m)
        for v, w, m in zip(values, weights, values if masks is None else masks)
    )
    total, share = (sum(side) for side in zip(*part))
    return aggregate.mean_or_keep(total, share, previous)


@st.composite
def cohorts(draw):
    clients, width = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    values = rng.normal(size=(clients, width)).astype(np.float32)
    weights = rng.choice([0.0, 0.5, 1.0, 3.0], size=clients).astype(np.float32)
    masks = rng.random((clients, width)) < 0.6
    previous = rng.normal(size=width).astype(np.float32)
    return values, weights, masks, previous


def by_definition(values, weights, masks, previous):
    share = weights[:, None].astype(np.float64) * masks
    total = (share * values).sum(axis=0)
    counted = share.sum(axis=0)
    return np.where(counted > 0, total / np.where(counted > 0, counted, 1), previous)


@settings(deadline=None, max_examples=60)
@given(cohorts())
def test_masked_mean_by_its_definition(drawn):
    values, weights, masks, previous = drawn
    mean = masked_mean(*map(jnp.asarray, (values, weights, previous, masks)))
    np.testing.assert_allclose(mean, by_definition(*drawn), rtol=1e-5, atol=1e-6)
    nobody = ~(masks & (weights[:, None] > 0)).any(axis=0)
    np.testing.assert_array_equal(np.asarray(mean)[nobody], previous[nobody])


@settings(deadline=None, max_examples=30)
@given(cohorts(), st.randoms(use_true_random=False), st.floats(-2, 2))
def test_linear_and_invariant_to_order(drawn, shuffler, factor):
    values, weights, masks, previous = map(jnp.asarray, drawn)
    mean = masked_mean(values, weights, previous, masks)
    order = np.arange(len(weights))
    shuffler.shuffle(order)
    again = masked_mean(values[order], weights[order], previous, masks[order])
    np.testing.assert_allclose(mean, again, rtol=1e-5, atol=1e-6)
    scaled = masked_mean(factor * values, weights, factor * previous, masks)
    np.testing.assert_allclose(scaled, factor * mean, rtol=1e-5, atol=1e-5)
    doubled = masked_mean(values, 2 * weights, previous, masks)
    np.testing.assert_allclose(doubled, mean, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(cohorts())
def test_equal_clients_keep_their_value(drawn):
    values, weights, _, previous = map(jnp.asarray, drawn)
    equal = jnp.broadcast_to(values[:1], values.shape)
    mean = masked_mean(equal, weights, previous)
    expected = values[0] if weights.sum() > 0 else previous
    np.testing.assert_allclose(mean, expected, rtol=3e-7)


def test_what_is_masked_out_may_be_anything():
    values = jnp.array([[1.0, jnp.inf], [3.0, 5.0], [jnp.nan, jnp.nan]])
    masks = jnp.array([[True, False], [True, True], [True, True]])
    mean = masked_mean(values, jnp.array([1.0, 1.0, 0.0]), jnp.zeros(2), masks)
    np.testing.assert_array_equal(mean, [2.0, 5.0])


def test_parts_add_up_over_trees():
    trees = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.ones((3, 1, 2))}
    weights = jnp.array([1.0, 2.0, 1.0])
    parts = jax.vmap(aggregate.weighted_part)(trees, weights)
    total, share = jax.tree.map(lambda leaf: leaf.sum(axis=0), parts)
    zeros = jax.tree.map(lambda leaf: leaf[0], trees)
    mean = aggregate.mean_or_keep(total, share, zeros)
    np.testing.assert_allclose(mean["a"], [2.0, 3.0])
    np.testing.assert_allclose(mean["b"], [[1.0, 1.0]])


def test_sums_of_16_bit_values_are_wider():
    # In bfloat16 itself 256 + 1 is 256.
    value = jnp.ones((), jnp.bfloat16)
    part = aggregate.weighted_part(value, jnp.float32(1.0))
    total, share = jax.tree.map(lambda leaf: 600 * leaf, part)
    assert total.dtype == share.dtype == jnp.float32
    mean = aggregate.mean_or_keep(total, share, value)
    assert mean.dtype == jnp.bfloat16
    assert mean == 1


@settings(deadline=None, max_examples=8)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99)
)
def test_svd_of_a_stack_is_that_of_the_product(width, out, stack, rank, seed):
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(width, stack)), rng.normal(size=(stack, out))
    left, values, right = aggregate.low_rank_svd(
        jnp.asarray(u, jnp.float32), jnp.asarray(v, jnp.float32), rank
    )
    assert (left.shape, values.shape, right.shape) == ((width, rank), (rank,), (rank, out))
    exact = np.linalg.svd(u @ v, compute_uv=False)
    there = min(len(exact), rank)
    np.testing.assert_allclose(values[:there], exact[:there], rtol=1e-4, atol=1e-4 * exact[0])
    assert (np.asarray(values[there:]) == 0).all()
    best = np.linalg.svd(u @ v)
    cut = (best[0][:, :there] * best[1][None, :there]) @ best[2][:there]
    np.testing.assert_allclose((left * values[None, :]) @ right, cut, atol=2e-3 * exact[0])


def test_svd_of_a_wide_stack_keeps_what_is_small_and_drops_what_is_rounding():
    rng = np.random.default_rng(0)
    values = np.array([1.0, 1e-2, 4e-4, 5e-5])
    left, right = (np.linalg.qr(rng.normal(size=(1024, 4)))[0] for _ in range(2))
    mix = np.linalg.qr(rng.normal(size=(12, 4)))[0]  # a stack of three clients, with rank to spare
    u, v = (left * values[None, :]) @ mix.T, mix @ right.T
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    _, found, _ = aggregate.low_rank_svd(f32(u), f32(v), 8)
    np.testing.assert_allclose(found[:4], values, rtol=5e-3)
    assert (np.asarray(found[4:]) == 0).all()
    # Two clients that cancel leave nothing but the rounding of each.
    none = aggregate.low_rank_svd(f32(np.hstack([u, u])), f32(np.vstack([v, -v])), 8)[1]
    assert (np.asarray(none) == 0).all()


def test_shares_of_alike_clients():
    likeness = jnp.asarray([0.0, -1.0, 5.0]), jnp.asarray([-1000.0])
    weights = jnp.asarray([2.0, 1.0, 0.0]), jnp.asarray([1.0])
    near, far = aggregate.shares_of_alike(likeness, weights, 0.01)
    np.testing.assert_allclose(near, [2.0, np.exp(-60), 0.0], rtol=1e-5)  # the third does not count
    np.testing.assert_allclose(far, [np.exp(-60)], rtol=1e-5)
    alone = aggregate.shares_of_alike((jnp.asarray([-900.0, -900.01]),), (jnp.ones(2),), 0.01)[0]
    np.testing.assert_allclose(alone, [1.0, np.exp(-1)], rtol=1e-2)
    nobody = aggregate.shares_of_alike((jnp.asarray([0.5]),), (jnp.zeros(1),), 1.0)[0]
    np.testing.assert_array_equal(nobody, 0)


def test_norms_of_products_from_their_factors():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 7, 2)), rng.normal(size=(3, 2, 5))
    norms = aggregate.product_norm(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(norms, np.linalg.norm(a @ b, axis=(1, 2)), rtol=1e-5)
    assert aggregate.product_norm(jnp.zeros((7, 2)), jnp.ones((2, 5))) == 0


def test_cohorts_are_grouped_by_name_depth_and_shapes():
    specs = bench.twins()
    groups = aggregate.architectures(specs)
    assert sorted(groups.values()) == [(0, 1), (2,)]
    renamed = dataclasses.replace(specs[1], model=dataclasses.replace(specs[1].model, name="b"))
    deeper = dataclasses.replace(specs[1], model=dataclasses.replace(specs[1].model, num_layers=3))
    for other in (renamed, deeper):
        assert len(aggregate.architectures((specs[0], other))) == 2


def test_stacks_multiply_to_the_weighted_sum_of_products():
    specs = bench.twins(ranks=(2, 3), alphas=(16.0, 4.0))
    uploads, weights = bench.uploads_of(specs), (jnp.array([1.0, 0.0, 2.0]), jnp.array([3.0, 1.0]))
    ids = jnp.arange(3, dtype=jnp.int32), jnp.arange(2, dtype=jnp.int32)
    stacks, valid = aggregate.stack_products(specs, (0, 1), uploads, weights, ids)
    # Who counts comes first in its cohort: two clients of three at rank 2, two of two at rank 3.
    np.testing.assert_array_equal(valid, [True] * 4 + [False] * 2 + [True] * 6)
    u, v = stacks["q"]
    expected = bench.mean_delta(specs, (0, 1), uploads, weights, "q")
    np.testing.assert_allclose(u @ v, expected, rtol=1e-4, atol=1e-5)
    nobody = aggregate.stack_products(specs, (0, 1), (None, None), weights, ids)
    assert nobody is None

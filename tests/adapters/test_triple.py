"""Triple factors: selection, cores and their gradients, folding, bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

from h2tune_jax import FederationError
from h2tune_jax.adapters import triple

# Few distinct values, both zeros among them: ties everywhere.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0])


@st.composite
def scored(draw, entries):
    size = draw(st.integers(1, 9))
    rank = draw(st.integers(1, size))
    lead = draw(st.sampled_from([(), (2,), (2, 3)]))
    shape = (*lead, size, size) if entries else (*lead, size)
    elements = draw(st.sampled_from([TIED, st.floats(-3, 3, width=32, allow_subnormal=False)]))
    return draw(hnp.arrays(np.float32, shape, elements=elements)), rank


def best_by_hand(values, count):
    """The largest by value, then by position, in ascending position."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


@settings(deadline=None, max_examples=60)
@given(scored(entries=False))
def test_block_takes_the_best_coordinates(drawn):
    scores, rank = drawn
    size = scores.shape[-1]
    index = np.asarray(triple.select(jnp.asarray(scores), rank, strategy="block"))
    assert index.shape == (*scores.shape[:-1], rank * rank)
    assert index.dtype == np.int32
    for at in np.ndindex(scores.shape[:-1]):
        chosen = best_by_hand(scores[at], rank)
        expected = [row * size + column for row in chosen for column in chosen]
        assert index[at].tolist() == expected == sorted(expected)
        recovered = triple.coordinates(jnp.asarray(index[at]), rank, size)
        assert np.asarray(recovered).tolist() == chosen


@settings(deadline=None, max_examples=60)
@given(scored(entries=True), st.sampled_from(["score", "score_frozen", "magnitude"]))
def test_entries_are_the_largest_in_index_order(drawn, strategy):
    values, rank = drawn
    size = values.shape[-1]
    given_as = {"middle": jnp.asarray(values)} if strategy == "magnitude" else {}
    scores = None if strategy == "magnitude" else jnp.asarray(values)
    index = np.asarray(triple.select(scores, rank, strategy=strategy, **given_as))
    compared = np.abs(values) if strategy == "magnitude" else values
    for at in np.ndindex(values.shape[:-2]):
        flat = compared[at].reshape(size * size)
        assert index[at].tolist() == best_by_hand(flat, rank * rank)


def test_leading_and_random():
    middle = jnp.zeros((2, 5, 5))
    index = triple.select(None, 2, strategy="leading", middle=middle)
    np.testing.assert_array_equal(index, [[0, 1, 5, 6]] * 2)
    np.testing.assert_array_equal(index, triple.select(jnp.zeros((2, 5)), 2, strategy="leading"))
    one, again, other = (
        np.asarray(triple.select(None, 3, strategy="random", middle=middle, key=jax.random.key(k)))
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    for rows in one:
        assert sorted(set(rows.tolist())) == rows.tolist()
        assert rows.min() >= 0
        assert rows.max() < 25


def test_smaller_ranks_take_a_subset_of_the_same_block():
    scores = jax.random.uniform(jax.random.key(0), (16,))
    held = [
        set(np.asarray(triple.coordinates(triple.select(scores, r, strategy="block"), r, 16)))
        for r in (2, 5, 9)
    ]
    assert held[0] < held[1] < held[2]


@settings(deadline=None, max_examples=60)
@given(scored(entries=True), st.integers(0, 2**31 - 1))
def test_core_and_scatter_are_transposes_and_round_trip(drawn, seed):
    scores, rank = drawn
    size = scores.shape[-1]
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=scores.shape).astype(np.float32)
    other = rng.normal(size=(*scores.shape[:-2], rank, rank)).astype(np.float32)
    index = triple.select(jnp.asarray(scores), rank, strategy="score")
    taken = triple.core(jnp.asarray(middle), index)
    back = triple.scatter(jnp.asarray(other), index, size)
    np.testing.assert_allclose(np.vdot(taken, other), np.vdot(middle, back), rtol=1e-4, atol=1e-5)
    # Exact at the selected entries, zero elsewhere.
    np.testing.assert_array_equal(triple.core(back, index), other)
    assert np.count_nonzero(back) <= other.size
    np.testing.assert_array_equal(
        triple.scatter(taken, index, size), np.where(np.asarray(back) != 0, middle, 0)
    )


def test_straight_through_gradient_of_entries_by_hand():
    middle = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    index = jnp.array([1, 3, 4, 8], jnp.int32)  # 2, 4 / 5, 9
    weight = jnp.array([[10.0, 20.0], [30.0, 40.0]])
    objective = lambda m, s: (triple.core(m, index, scores=s) * weight).sum()
    scores = jax.random.normal(jax.random.key(0), (3, 3))
    np.testing.assert_array_equal(triple.core(middle, index, scores=scores), [[2, 4], [5, 9]])
    to_middle, to_scores = jax.grad(objective, (0, 1))(middle, scores)
    np.testing.assert_array_equal(to_middle, [[0, 10, 0], [20, 30, 0], [0, 0, 40]])
    # dL/dT * M: 10*2, 20*4, 30*5, 40*9.
    np.testing.assert_array_equal(to_scores, [[0, 20, 0], [80, 150, 0], [0, 0, 360]])


def test_straight_through_gradient_of_a_block_by_hand():
    middle = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    scores = jnp.array([1.0, 0.0, 2.0])
    index = triple.select(scores, 2, strategy="block")
    np.testing.assert_array_equal(index, [0, 2, 6, 8])  # coordinates 0 and 2: 1, 3 / 7, 9
    weight = jnp.array([[10.0, 20.0], [30.0, 40.0]])
    objective = lambda s: (triple.core(middle, index, scores=s) * weight).sum()
    # dT * M = [[10, 60], [210, 360]]; a coordinate gets its row plus its column.
    expected = [10 + 60 + 10 + 210, 0, 210 + 360 + 60 + 360]
    np.testing.assert_array_equal(jax.grad(objective)(scores), expected)


@pytest.mark.parametrize("residual", [True, False])
def test_gradients_of_apply_and_core(residual):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (3, 6), (6, 5), (6, 2), (4, 4), (2, 5)
    x, w, a, middle, b = (jax.random.normal(k, s) for k, s in zip(keys, shapes))
    index = triple.select(jnp.array([3.0, 1.0, 2.0, 0.0]), 2, strategy="block")

    def product(x, w, a, middle, b):
        core = triple.core(middle, index)
        return triple.apply(x, w, a, core, b, scale=1.7, residual=residual)

    check_grads(product, (x, w, a, middle, b), order=2, modes=["fwd", "rev"], atol=1e-2, rtol=1e-2)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
def test_fold_equals_apply(d, f, r, residual, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, w, a, core, b = draw(2, 3, d), draw(d, f), draw(d, r), draw(r, r), draw(r, f)
    y = triple.apply(x, w, a, core, b, scale=0.7, residual=residual)
    a2, b2 = triple.fold(a, core, b, residual=residual)
    np.testing.assert_allclose(y, x @ (w + 0.7 * (a2 @ b2)), rtol=2e-4, atol=2e-4)
    # By the definition, in float64.
    exact = np.asarray(core, np.float64) + (np.eye(r) if residual else 0)
    delta = 0.7 * np.asarray(a, np.float64) @ exact @ np.asarray(b, np.float64)
    np.testing.assert_allclose(y, x @ (np.asarray(w) + delta), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("residual", [True, False])
def test_a_fresh_adapter_changes_nothing(residual):
    a, b = triple.init(jax.random.key(0), 3, 7, 5, 2, residual=residual)
    assert a.shape == (3, 7, 2)
    assert b.shape == (3, 2, 5)
    x, w = jnp.ones((4, 7)), jnp.ones((7, 5))
    y = triple.apply(x, w, a[0], jnp.zeros((2, 2)), b[0], scale=8.0, residual=residual)
    np.testing.assert_array_equal(y, x @ w)
    assert np.abs(a).max() <= 7**-0.5
    assert np.abs(a).max() > 0.5 * 7**-0.5
    assert (np.asarray(b) == 0).all() == residual


def test_bfloat16_inputs_with_float32_masters():
    a, b = triple.init(jax.random.key(0), 1, 8, 8, 2, residual=False)
    x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.eye(8, dtype=jnp.bfloat16)
    y = triple.apply(x, w, a[0], jnp.eye(2), b[0], scale=2.0)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ (np.eye(8) + 2 * 2 * np.asarray(a[0] @ b[0], np.float64))
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=3e-2, atol=3e-2)


def test_seeded_basis_is_common_to_equal_widths_and_depths():
    key = jax.random.key(4)
    deep = triple.basis(key, jnp.arange(6), 8, 5, jnp.float32)
    pruned = triple.basis(key, jnp.array([0, 2, 5]), 8, 5, jnp.float32)
    np.testing.assert_array_equal(pruned, deep[np.array([0, 2, 5])])


def test_realign_follows_the_coordinates():
    basis = jnp.arange(20.0).reshape(2, 10) + 100
    a, b = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), jnp.array([[1.0], [2.0], [3.0]])
    old, new = jnp.array([2, 5, 7]), jnp.array([1, 5, 7])
    moved_a, moved_b = triple.realign(a, b, old, new, basis, None)
    # Coordinate 1 is new: the basis' column, and no output; 5 and 7 stay.
    np.testing.assert_array_equal(moved_a, [[101, 2, 3], [111, 5, 6]])
    np.testing.assert_array_equal(moved_b, [[0], [2], [3]])
    same_a, same_b = triple.realign(a, b, old, old, basis, None)
    np.testing.assert_array_equal(same_a, a)
    np.testing.assert_array_equal(same_b, b)
    shifted_a, shifted_b = triple.realign(a, b, old, jnp.array([5, 7, 9]), basis, basis.mT[:, :1])
    np.testing.assert_array_equal(shifted_a, [[2, 3, 109], [5, 6, 119]])
    np.testing.assert_array_equal(shifted_b, [[2], [3], [109]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: triple.select(jnp.zeros(3), 4, strategy="block"), "rank 4.*R = 3"),
        (lambda: triple.select(jnp.zeros(3), 1, strategy="blok"), "did you mean 'block'"),
        (lambda: triple.select(jnp.zeros((3, 3)), 1, strategy="random"), "needs a key"),
        (lambda: triple.select(None, 1, strategy="score", middle=jnp.zeros((3, 3))), "needs scores"),
        (lambda: triple.select(None, 1, strategy="magnitude"), "needs middle"),
        (lambda: triple.core(jnp.zeros((3, 3)), jnp.zeros(3, jnp.int32)), r"r\*r positions"),
        (
            lambda: triple.apply(
                jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((3, 1)), jnp.ones((1, 1)),
                jnp.ones((1, 5)), scale=1.0,
            ),
            "site shapes do not fit",
        ),
        (
            lambda: triple.apply(
                jnp.ones((2, 3)), jnp.ones((3, 4), jnp.bfloat16), jnp.ones((3, 1)),
                jnp.ones((1, 1)), jnp.ones((1, 4)), scale=1.0,
            ),
            "mixed dtypes",
        ),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(FederationError, match=message):
        call()

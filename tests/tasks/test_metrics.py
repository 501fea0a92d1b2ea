import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from h2tune_jax.tasks import metrics


def count(predictions, labels, mask=None, num_classes=3):
    arrays = jnp.asarray(predictions, jnp.int32), jnp.asarray(labels, jnp.int32)
    mask = jnp.ones(len(labels), bool) if mask is None else jnp.asarray(mask, bool)
    return metrics.count_confusion(*arrays, mask, num_classes=num_classes)


def test_confusion_accuracy_and_f1_by_hand():
    labels, predictions = [0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 0, 0]
    confusion = count(predictions, labels)
    np.testing.assert_array_equal(confusion, [[1, 1, 0], [1, 2, 0], [1, 0, 0]])
    assert metrics.accuracy(confusion) == 0.5
    # F1: 2*1/(2+3) = 0.4, 2*2/(3+3) = 2/3, 2*0/(1+0) = 0
    np.testing.assert_allclose(metrics.macro_f1(confusion), (0.4 + 2 / 3) / 3, rtol=1e-6)


def test_f1_leaves_out_classes_that_occur_nowhere():
    confusion = count([0, 1, 1], [0, 1, 0], num_classes=5)
    np.testing.assert_allclose(metrics.macro_f1(confusion), (2 / 3 + 2 / 3) / 2, rtol=1e-6)
    assert np.isnan(metrics.macro_f1(count([], [])))
    assert np.isnan(metrics.accuracy(count([], [])))


def test_confusion_counts_neither_masked_nor_unknown_pairs():
    confusion = count([0, 1, 2, 0], [0, 1, -1, 7], mask=[True, False, True, True])
    np.testing.assert_array_equal(confusion, np.diag([1, 0, 0]))


def ranks(seed, n, ties):
    rng = np.random.default_rng(seed)
    draw = (lambda: rng.integers(0, 4, n)) if ties else (lambda: rng.normal(size=n))
    return draw().astype(np.float32), draw().astype(np.float32)


spearman = jax.jit(metrics.spearman)


@pytest.mark.parametrize("ties", [False, True])
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), n=st.sampled_from([3, 8, 50]), extra=st.sampled_from([0, 5]))
def test_spearman_equals_scipy_whatever_the_padding(ties, seed, n, extra):
    x, y = ranks(seed, n, ties)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return
    junk = np.resize(np.array([np.nan, np.inf, -np.inf, 0], np.float32), extra)
    order = np.random.default_rng(seed).permutation(n + extra)
    both = [jnp.asarray(np.concatenate([v, junk])[order]) for v in (x, y)]
    mask = jnp.asarray((np.arange(n + extra) < n)[order])
    expected = scipy.stats.spearmanr(x.astype(np.float64), y.astype(np.float64)).statistic
    np.testing.assert_allclose(spearman(*both, mask), expected, atol=1e-5)


def test_spearman_of_a_large_set_and_of_none():
    x, y = ranks(0, 20_000, ties=False)
    y = y + 0.5 * x
    mask = jnp.ones(len(x), bool)
    expected = scipy.stats.spearmanr(x, y).statistic
    found = spearman(jnp.asarray(x), jnp.asarray(y), mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    constant = jnp.zeros(len(x))
    assert np.isnan(spearman(constant, jnp.asarray(y), mask))
    assert np.isnan(spearman(jnp.asarray(x).at[3].set(jnp.nan), jnp.asarray(y), mask))
    assert np.isnan(spearman(jnp.asarray(x), jnp.asarray(y), ~mask))


def test_ranks_with_infinite_values():
    values = jnp.array([jnp.inf, 1.0, jnp.inf, -jnp.inf, 0.0])
    mask = jnp.array([True, True, True, True, False])
    np.testing.assert_array_equal(metrics.rank(values, mask)[:4], [3.5, 2.0, 3.5, 1.0])


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    tokens = jnp.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    answer = jnp.array([[False, True, True, True], [False, False, False, True]])
    sum_tokens = jax.jit(metrics.sum_tokens)
    sums = sum_tokens(jnp.zeros((2, 4, 7)), tokens, answer, jnp.array([True, True]))
    assert sums.num_tokens == 4
    np.testing.assert_allclose(metrics.perplexity(sums), 7.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.token_accuracy(sums), 0.25)  # argmax of ties is token 0
    one = sum_tokens(jnp.zeros((2, 4, 7)), tokens, answer, jnp.array([True, False]))
    assert one.num_tokens == 3
    assert metrics.token_accuracy(one) == 0


def measure(batch):
    examples, mask = batch
    confusion = metrics.count_confusion(examples["p"], examples["y"], mask, num_classes=3)
    return {"confusion": confusion, "n": jnp.sum(mask)}, examples["p"] * 10


@functools.partial(jax.jit, static_argnames="size")
def scan(examples, m, size):
    return metrics.scan_batches(measure, examples, m, batch_size=size)


@settings(deadline=None, max_examples=20)
@given(n=st.sampled_from([1, 8]), short=st.integers(0, 3), size=st.sampled_from([3, 8, 20]))
def test_scanned_sums_equal_those_of_one_batch(n, short, size):
    rng = np.random.default_rng(n)
    examples = {k: jnp.asarray(rng.integers(0, 3, n).astype(np.int32)) for k in "py"}
    m = max(n - short, 0)
    sums, outputs = scan(examples, jnp.asarray(m), size)
    whole = np.zeros((3, 3), int)
    np.add.at(whole, (np.asarray(examples["y"])[:m], np.asarray(examples["p"])[:m]), 1)
    np.testing.assert_array_equal(sums["confusion"], whole)
    assert sums["n"] == m
    np.testing.assert_array_equal(outputs, examples["p"] * 10)


def test_scanned_sums_map_over_clients_of_different_sizes():
    rng = np.random.default_rng(0)
    examples = {k: jnp.asarray(rng.integers(0, 3, (2, 7)).astype(np.int32)) for k in "py"}
    sizes = jnp.array([7, 4])
    run = lambda e, m: metrics.scan_batches(measure, e, m, batch_size=3)[0]
    mapped = jax.jit(jax.vmap(run))(examples, sizes)
    for i in range(2):
        one = run({k: v[i] for k, v in examples.items()}, sizes[i])
        np.testing.assert_array_equal(mapped["confusion"][i], one["confusion"])
        assert mapped["n"][i] == sizes[i]

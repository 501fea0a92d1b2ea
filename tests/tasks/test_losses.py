import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h2tune_jax.tasks import losses

ATOL = 2e-6  # float32 against a float64 oracle, values of order one


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_classification_by_hand():
    # softmax of (0, log 3) is (1/4, 3/4)
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 3.0], [5.0, 5.0]]))
    loss, metrics = losses.classification(
        logits, jnp.array([1, 0, 0]), jnp.array([True, True, False])
    )
    np.testing.assert_allclose(loss, -(np.log(0.75) + np.log(0.25)) / 2, atol=ATOL)
    assert metrics["accuracy"] == 0.5
    assert metrics["logits"].shape == (3, 2)
    np.testing.assert_array_equal(metrics["positions"], [True, True, False])


def test_regression_by_hand():
    outputs = jnp.array([[1.0], [4.0], [9.0]])
    mask = jnp.array([True, True, False])
    loss, metrics = losses.regression(outputs, jnp.array([0.0, 2.0, jnp.nan]), mask)
    assert loss == 2.5
    assert metrics["mae"] == 1.5
    assert metrics["logits"].shape == (3, 1)
    same, _ = losses.regression(outputs[:, 0], jnp.array([0.0, 2.0, 7.0]), mask)
    assert same == loss


def causal_oracle(logits, tokens, answer_mask, mask):
    logp, total, hits, count = log_softmax(logits), 0.0, 0, 0
    for b in range(tokens.shape[0]):
        for t in range(1, tokens.shape[1]):
            if mask[b] and answer_mask[b, t]:
                total -= logp[b, t - 1, tokens[b, t]]
                hits += np.argmax(logits[b, t - 1]) == tokens[b, t]
                count += 1
    return total / count, hits / count


def text_batch(seed, b=3, t=6, v=5):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, v, (b, t)).astype(np.int32)
    answer = np.zeros((b, t), bool)
    for row in range(b):
        start = rng.integers(1, t)
        answer[row, start : rng.integers(start, t) + 1] = True
    return draw(seed + 1, b, t, v), tokens, answer


@pytest.mark.parametrize("seed", range(3))
def test_causal_lm_against_a_loop_in_float64(seed):
    logits, tokens, answer = text_batch(seed)
    mask = np.array([True, False, True])
    loss, metrics = jax.jit(losses.causal_lm)(*map(jnp.asarray, (logits, tokens, answer, mask)))
    expected, hits = causal_oracle(logits, tokens, answer, mask)
    np.testing.assert_allclose(loss, expected, atol=ATOL)
    np.testing.assert_allclose(metrics["token_accuracy"], hits, atol=ATOL)
    # Position t predicts token t + 1, and padded rows have none.
    np.testing.assert_array_equal(metrics["positions"][0, :-1], answer[0, 1:])
    assert not metrics["positions"][:, -1].any()
    assert not metrics["positions"][1].any()


def test_the_first_token_of_a_text_is_never_counted():
    logits, tokens, _ = text_batch(0)
    everything = jnp.ones(tokens.shape, bool)
    mask = jnp.ones(3, bool)
    _, metrics = losses.causal_lm(jnp.asarray(logits), jnp.asarray(tokens), everything, mask)
    assert metrics["positions"].sum() == tokens.size - 3


@pytest.mark.parametrize("normalise", ["length", "sum"])
def test_multiple_choice_against_a_loop_in_float64(normalise):
    rng = np.random.default_rng(3)
    b, ch, t, v = 2, 3, 5, 4
    logits, tokens = draw(4, b, ch, t, v), rng.integers(0, v, (b, ch, t)).astype(np.int32)
    answer = np.zeros((b, ch, t), bool)
    answer[:, 0, 2:4], answer[:, 1, 2:5], answer[0, 2, 3:4] = True, True, True  # row 1: 2 choices
    logp, scores = log_softmax(logits), np.full((b, ch), -np.inf)
    for i in range(b):
        for c in range(ch):
            terms = [logp[i, c, s - 1, tokens[i, c, s]] for s in range(1, t) if answer[i, c, s]]
            if terms:
                scores[i, c] = np.mean(terms) if normalise == "length" else np.sum(terms)
    labels = np.array([2, 1])
    expected = -np.mean([log_softmax(scores[i])[labels[i]] for i in range(b)])
    run = jax.jit(functools.partial(losses.multiple_choice, normalise=normalise))
    loss, metrics = run(*map(jnp.asarray, (logits, tokens, answer, labels)), jnp.ones(b, bool))
    np.testing.assert_allclose(loss, expected, atol=ATOL)
    finite = np.isfinite(scores)
    np.testing.assert_allclose(np.asarray(metrics["logits"])[finite], scores[finite], atol=ATOL)
    assert metrics["accuracy"] == np.mean(scores.argmax(axis=1) == labels)
    assert metrics["logits"].argmax(axis=1)[1] != 2
    assert np.isfinite(metrics["logits"]).all()


def test_the_two_normalisations_can_choose_differently():
    # One token of log-likelihood -1.5 against three of -1 each.
    step = {False: np.log([np.exp(-1.5), 1 - np.exp(-1.5)]), True: np.log([1 / np.e, 1 - 1 / np.e])}
    logits = np.stack([np.tile(step[c], (4, 1)) for c in (False, True)])[None].astype(np.float32)
    answer = np.array([[[0, 1, 0, 0], [0, 1, 1, 1]]], bool)
    arrays = jnp.asarray(logits), jnp.zeros((1, 2, 4), jnp.int32), jnp.asarray(answer)
    mask = jnp.ones(1, bool)
    score = jax.jit(losses.score_choices, static_argnames="normalise")
    by_length = score(*arrays, mask, normalise="length")
    by_sum = score(*arrays, mask, normalise="sum")
    np.testing.assert_allclose(by_length, [[-1.5, -1.0]], atol=ATOL)
    np.testing.assert_allclose(by_sum, [[-1.5, -3.0]], atol=ATOL)
    with pytest.raises(ValueError, match="'length' or 'sum'"):
        losses.score_choices(*arrays, mask, normalise="mean")  # pyright: ignore


@pytest.mark.parametrize("label", [-1, 3, 2**31 - 1])
def test_a_label_outside_the_logits_shows(label):
    logits = jnp.zeros((2, 3))
    labels = jnp.array([0, label], jnp.int32)
    loss, _ = losses.classification(logits, labels, jnp.array([True, True]))
    assert np.isnan(loss)
    loss, _ = losses.classification(logits, labels, jnp.array([True, False]))
    np.testing.assert_allclose(loss, np.log(3), atol=ATOL)


def test_a_batch_in_which_nothing_counts_has_loss_and_gradient_zero():
    logits, tokens, answer = map(jnp.asarray, text_batch(0))
    none = jnp.zeros(3, bool)
    for fn in (
        lambda x: losses.causal_lm(x, tokens, answer, none)[0],
        lambda x: losses.classification(x[:, 0], tokens[:, 0], none)[0],
        lambda x: losses.regression(x[:, 0, 0], x[:, 1, 0], none)[0],
        lambda x: losses.multiple_choice(
            x[:, None], tokens[:, None], answer[:, None], tokens[:, 0], none
        )[0],
    ):
        value, grad = jax.jit(jax.value_and_grad(fn))(logits)
        assert value == 0
        np.testing.assert_array_equal(grad, 0)


def losses_of(kind, b, seed):
    """A loss of logits whose leading axis is b examples, with arrays to slice alike."""
    rng = np.random.default_rng(seed)
    if kind == "classification":
        arrays = draw(seed, b, 4), rng.integers(0, 4, b).astype(np.int32)
    elif kind == "regression":
        arrays = draw(seed, b, 1), draw(seed + 1, b)
    elif kind == "causal_lm":
        arrays = text_batch(seed, b)
    else:
        logits, tokens, answer = text_batch(seed, 3 * b)
        shape = lambda x: x.reshape(b, 3, *x.shape[1:])
        labels = rng.integers(0, 3, b).astype(np.int32)
        arrays = shape(logits), shape(tokens), shape(answer), labels
    return getattr(losses, kind), arrays


@functools.cache
def measured(kind):
    """(logits, rest, mask) -> ((loss, scalar metrics), gradient), compiled once a shape."""

    def measure(logits, rest, mask):
        loss, metrics = getattr(losses, kind)(logits, *rest, mask)
        return loss, {name: value for name, value in metrics.items() if name in SCALARS}

    return jax.jit(jax.value_and_grad(measure, has_aux=True))


KINDS = ("classification", "regression", "causal_lm", "multiple_choice")
SCALARS = ("accuracy", "mae", "token_accuracy")


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**16), extra=st.sampled_from([1, 4]), poison=st.sampled_from([0.0, np.nan])
)
def test_padded_rows_change_neither_loss_nor_metric_nor_gradient(kind, seed, extra, poison):
    b = 3
    _, arrays = losses_of(kind, b, seed)
    run = measured(kind)
    (loss, metrics), grad = run(
        jnp.asarray(arrays[0]), [jnp.asarray(a) for a in arrays[1:]], jnp.ones(b, bool)
    )
    # Rows of rubbish: random tokens and labels (also outside the set), logits that may be NaN.
    junk = losses_of(kind, extra, seed + 7)[1]
    junk = [junk[0] + np.float32(poison), *junk[1:]]
    if kind == "classification":
        junk[1] = np.full(extra, -5, np.int32)
    padded = [jnp.asarray(np.concatenate([a, j])) for a, j in zip(arrays, junk)]
    mask = jnp.arange(b + extra) < b
    (padded_loss, padded_metrics), padded_grad = run(padded[0], padded[1:], mask)
    np.testing.assert_allclose(padded_loss, loss, atol=ATOL)
    for name, value in metrics.items():
        np.testing.assert_allclose(padded_metrics[name], value, atol=ATOL)
    np.testing.assert_allclose(padded_grad[:b], grad, atol=ATOL)
    np.testing.assert_array_equal(padded_grad[b:], 0)
    assert np.isfinite(loss)


@pytest.mark.parametrize("kind", ["causal_lm", "multiple_choice"])
@pytest.mark.parametrize("side", ["right", "left"])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**16), poison=st.sampled_from([0.0, np.nan]))
def test_padded_tokens_change_neither_loss_nor_metric(kind, side, seed, poison):
    _, arrays = losses_of(kind, 2, seed)
    mask = jnp.ones(2, bool)
    run = measured(kind)
    (loss, metrics), _ = run(jnp.asarray(arrays[0]), [jnp.asarray(a) for a in arrays[1:]], mask)
    axis = 1 if kind == "causal_lm" else 2
    logits, tokens, answer = arrays[:3]
    shape = (*tokens.shape[:axis], 2)
    rng = np.random.default_rng(seed)
    junk = (
        np.full((*shape, logits.shape[-1]), poison, np.float32),
        rng.integers(0, 5, shape).astype(np.int32),
        np.zeros(shape, bool),
    )
    join = lambda a, j: np.concatenate([a, j] if side == "right" else [j, a], axis=axis)
    padded = [jnp.asarray(join(a, j)) for a, j in zip((logits, tokens, answer), junk)]
    rest = [*padded[1:], *map(jnp.asarray, arrays[3:])]
    (again, more), _ = run(padded[0], rest, mask)
    np.testing.assert_allclose(again, loss, atol=ATOL)
    assert len(metrics) == 1
    for name in metrics:
        np.testing.assert_allclose(more[name], metrics[name], atol=ATOL)


def test_a_choice_that_fills_up_changes_nothing():
    _, (logits, tokens, answer, labels) = losses_of("multiple_choice", 2, 0)
    run, mask = measured("multiple_choice"), jnp.ones(2, bool)
    (loss, metrics), _ = run(
        jnp.asarray(logits), list(map(jnp.asarray, (tokens, answer, labels))), mask
    )
    wider = [np.concatenate([a, a[:, :1]], axis=1) for a in (logits, tokens, answer)]
    wider[2][:, 3] = False
    (again, more), grad = run(
        jnp.asarray(wider[0]), list(map(jnp.asarray, (*wider[1:], labels))), mask
    )
    np.testing.assert_allclose(again, loss, atol=ATOL)
    assert more["accuracy"] == metrics["accuracy"]
    np.testing.assert_array_equal(grad[:, 3], 0)
    assert np.abs(grad[:, :3]).max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_logits_give_a_float32_loss(kind):
    fn, arrays = losses_of(kind, 3, 0)
    rest = list(map(jnp.asarray, arrays[1:]))
    loss, _ = fn(jnp.asarray(arrays[0], jnp.bfloat16), *rest, jnp.ones(3, bool))
    same, _ = fn(jnp.asarray(arrays[0], jnp.bfloat16).astype(jnp.float32), *rest, jnp.ones(3, bool))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, same, atol=ATOL)

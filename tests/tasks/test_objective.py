import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from h2tune_jax.tasks import losses
from h2tune_jax.tasks.objective import TASKS, forward_of, make_evaluate_fn, make_loss_fn
from h2tune_jax.types import Adapters, Batch, FederationError

V, T = 5, 4


def forward(base, sites, head, examples, key):
    """A model of one table: the logits of a token are a row of it; a text's are those of its first."""
    shift = jnp.zeros(()) if key is None else jax.random.normal(key)
    rows = (base * sites["scale"])[examples["input_ids"]] + head + shift
    return rows[:, 0] if "first" in examples else rows


def make_batch(task, b=7, seed=0):
    rng = np.random.default_rng(seed)
    ids = lambda *shape: rng.integers(0, V, shape).astype(np.int32)
    if task == "multiple_choice":
        answer = rng.random((b, 3, T)) < 0.5
        answer[..., 1] = True
        return {"input_ids": ids(b, 3, T), "answer_mask": answer, "labels": ids(b) % 3}
    if task == "causal_lm":
        return {"input_ids": ids(b, T), "answer_mask": rng.random((b, T)) < 0.5}
    first = {"input_ids": ids(b, T), "first": np.zeros(b)}
    if task == "classification":
        return first | {"labels": ids(b)}
    return first | {"targets": rng.normal(size=b).astype(np.float32)}


def model(task):
    rng = np.random.default_rng(1)
    width = 1 if task == "regression" else V
    table = jnp.asarray(rng.normal(size=(V, width)).astype(np.float32))
    return table, Adapters({"scale": jnp.asarray(2.0)}, jnp.asarray(0.5))


def expected_loss(task, base, adapters, examples, mask):
    logits = (base * adapters.sites["scale"])[examples["input_ids"]] + adapters.head
    if task in ("classification", "regression"):
        logits = logits[:, 0]
    names = {
        "classification": ["labels"],
        "regression": ["targets"],
        "causal_lm": ["input_ids", "answer_mask"],
        "multiple_choice": ["input_ids", "answer_mask", "labels"],
    }[task]
    return getattr(losses, task)(logits, *[examples[n] for n in names], mask)


@pytest.mark.parametrize("task", TASKS)
def test_a_loss_function_feeds_the_model_and_the_loss(task):
    base, adapters = model(task)
    examples = {
        k: jnp.asarray(v, jnp.float32 if k == "first" else None)
        for k, v in make_batch(task).items()
    }
    mask = jnp.arange(7) < 6
    loss_fn = jax.jit(make_loss_fn(forward, task))
    loss, metrics = loss_fn(adapters, base, Batch(examples, mask), None)
    expected, more = jax.jit(lambda *a: expected_loss(task, *a))(base, adapters, examples, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert set(metrics) == set(more)
    assert {"logits", "positions"} < set(metrics)
    if task == "regression":
        # Softmax does not see a shift, squared error does: so the key reached the model.
        other, _ = loss_fn(adapters, base, Batch(examples, mask), jax.random.key(0))
        assert other != loss


def evaluate(task, examples, num_examples, batch_size):
    base, adapters = model(task)
    run = jax.jit(make_evaluate_fn(forward, task, batch_size=batch_size))
    arrays = {k: jnp.asarray(v, jnp.float32 if k == "first" else None) for k, v in examples.items()}
    return run(adapters, base, arrays, jnp.asarray(num_examples))


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_depends_neither_on_batches_nor_on_padding(task):
    examples = make_batch(task, b=11)
    whole = evaluate(task, examples, 11, 11)
    junk = make_batch(task, b=4, seed=9)
    padded = {k: np.concatenate([v, junk[k]]) for k, v in examples.items()}
    for result in (evaluate(task, examples, 11, 3), evaluate(task, padded, 11, 4)):
        assert set(result) == set(whole)
        for name, value in whole.items():
            assert np.isfinite(value)
            np.testing.assert_allclose(result[name], value, rtol=2e-6)


def test_evaluated_regression_equals_scipy():
    examples = make_batch("regression", b=20)
    base, adapters = model("regression")
    outputs = np.asarray(base)[examples["input_ids"][:, 0], 0] * 2.0 + 0.5
    result = evaluate("regression", examples, 20, 8)
    expected = scipy.stats.spearmanr(outputs, examples["targets"]).statistic
    np.testing.assert_allclose(result["spearman"], expected, atol=1e-5)
    np.testing.assert_allclose(
        result["mse"], np.mean((outputs - examples["targets"]) ** 2), rtol=1e-5
    )
    assert adapters.head == 0.5


def test_evaluated_accuracy_by_hand():
    # The table's likeliest class is the token itself, but token 4 says 0.
    table = jnp.eye(V).at[4].set(jnp.array([2.0, 0, 0, 0, 0]))
    adapters = Adapters({"scale": jnp.asarray(1.0)}, jnp.asarray(0.0))
    tokens = jnp.array([[0], [1], [2], [4], [4]], jnp.int32)
    examples = {
        "input_ids": tokens,
        "first": jnp.zeros(5),
        "labels": jnp.array([0, 1, 3, 0, 1], jnp.int32),
    }
    run = make_evaluate_fn(forward, "classification", batch_size=2)
    assert run(adapters, table, examples, jnp.asarray(5))["accuracy"] == np.float32(0.6)
    assert run(adapters, table, examples, jnp.asarray(2))["accuracy"] == 1.0


def test_a_model_is_asked_for_what_the_task_needs():
    class Both:
        def classify_fn(self, base, sites, head, inputs, *, key):
            return ("classify", base, sites, head, inputs, key)

        def logits_fn(self, base, sites, inputs, *, key):
            return ("logits", base, sites, inputs, key)

    for task in TASKS:
        found = forward_of(Both(), task)(1, 2, 3, {}, 5)  # pyright: ignore
        if task in ("classification", "regression"):
            assert found == ("classify", 1, 2, 3, {}, 5)
        else:
            assert found == ("logits", 1, 2, {}, 5)


def test_bad_input_is_named():
    with pytest.raises(FederationError, match=r"'clasification'.*did you mean 'classification'"):
        make_loss_fn(forward, "clasification")
    base, adapters = model("causal_lm")
    batch = Batch({"input_ids": jnp.zeros((2, T), jnp.int32)}, jnp.ones(2, bool))
    with pytest.raises(FederationError, match="'causal_lm' needs the field 'answer_mask'"):
        make_loss_fn(forward, "causal_lm")(adapters, base, batch, None)

"""A batch computed part by part gives what the whole batch gives, with less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.methods.fed_hello.fisher import layer_scores
from h2tune_jax.methods.lora import init_factors
from h2tune_jax.tasks.objective import TASKS, accumulate, make_loss_fn
from h2tune_jax.types import Adapters, Batch, FederationError

B, V, T = 8, 5, 4


def forward(base, sites, head, examples, key):
    """A model of one table, with a hidden layer; a text's logits are those of its first token."""
    rows = jnp.tanh(base[examples["input_ids"]] @ sites["w"]) @ head
    return rows[:, 0] if "first" in examples else rows


def make_case(task):
    rng = np.random.default_rng(TASKS.index(task))
    ids = lambda *shape: jnp.asarray(rng.integers(0, V, shape), jnp.int32)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    answer = jnp.asarray(rng.random((B, 3, T)) < 0.6)
    examples = {
        "classification": {"input_ids": ids(B, T), "first": draw(B), "labels": ids(B)},
        "regression": {"input_ids": ids(B, T), "first": draw(B), "targets": draw(B)},
        "causal_lm": {"input_ids": ids(B, T), "answer_mask": answer[:, 0]},
        "multiple_choice": {
            "input_ids": ids(B, 3, T), "answer_mask": answer, "labels": ids(B) % 3,
        },
    }[task]  # fmt: skip
    head = draw(6, 1 if task == "regression" else V)
    return draw(V, 6), Adapters({"w": draw(6, 6)}, head), examples


MASKS = {
    "all": np.ones(B, bool),
    "some": np.array([1, 0, 1, 1, 0, 0, 0, 1], bool),
    "an empty part": np.array([1, 1, 0, 1, 0, 0, 0, 0], bool),
    "none": np.zeros(B, bool),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("part_size", [1, 2, 3, 4, 5, 8])
def test_value_metrics_logits_and_gradients_are_those_of_the_whole(task, part_size):
    """Also where the last part has rows to spare: of 8 rows 3 and 3 and 2, or 5 and 3."""
    base, adapters, examples = make_case(task)
    loss_fn = make_loss_fn(forward, task)

    @jax.jit
    def measure(adapters, mask):
        run = lambda fn: jax.value_and_grad(
            lambda ours: fn(ours, base, Batch(examples, mask), None), has_aux=True
        )(adapters)
        return run(loss_fn), run(accumulate(loss_fn, part_size))

    for mask in MASKS.values():
        whole, split = measure(adapters, jnp.asarray(mask))
        (_, seen), _ = split
        toy.assert_trees_close(split, whole, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(seen["positions"], whole[0][1]["positions"])
        assert seen["logits"].shape == whole[0][1]["logits"].shape


def test_dropout_differs_from_part_to_part():
    def loss_fn(adapters, base, batch, key):
        kept = jax.random.bernoulli(key, 0.5, (batch.mask.shape[0],))
        return kept.mean(), {"logits": kept[:, None], "positions": batch.mask}

    batch = Batch({}, jnp.ones(64, bool))
    _, seen = accumulate(loss_fn, 32)(Adapters({}, None), {}, batch, jax.random.key(0))
    first, second = seen["logits"].reshape(2, 32)
    assert bool((first != second).any())


def test_a_batch_of_one_part_is_the_plain_loss():
    """Single rows, such as `predict` asks about, and the end of a test set."""

    def loss_fn(adapters, base, batch, key):
        return jax.random.uniform(key), {"size": jnp.asarray(batch.mask.shape[0])}

    split, key = accumulate(loss_fn, 4), jax.random.key(0)
    for size in (1, 3, 4):
        args = Adapters({}, None), {}, Batch({}, jnp.ones(size, bool)), key
        assert split(*args) == loss_fn(*args)


def test_what_fills_the_last_part_up_is_a_row_of_the_batch_and_does_not_count():
    def loss_fn(adapters, base, batch, key):
        x, seen = batch.examples["x"], batch.mask.astype(jnp.float32)
        # Zeros in place of real rows would have no value here.
        mean = (seen / x).sum() / seen.sum()
        return mean, {"logits": x, "positions": batch.mask}

    batch = Batch({"x": jnp.asarray([1.0, 2, 4, 8, 16])}, jnp.ones(5, bool))
    loss, seen = accumulate(loss_fn, 3)(Adapters({}, None), {}, batch, None)
    assert float(loss) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 8 + 1 / 16) / 5)
    np.testing.assert_array_equal(seen["logits"], batch.examples["x"])
    np.testing.assert_array_equal(seen["positions"], batch.mask)


def test_counts_average_as_numbers():
    loss_fn = lambda adapters, base, batch, key: (
        jnp.zeros(()),
        {"seen": batch.mask.sum(dtype=jnp.int32)},
    )
    batch = Batch({}, jnp.asarray([True, True, True, False]))
    _, seen = accumulate(loss_fn, 2)(Adapters({}, None), {}, batch, None)
    assert float(seen["seen"]) == pytest.approx(2 * 2 / 3 + 1 / 3)


def test_one_part_lives_at_a_time():
    """Of the hidden layers an eighth is kept: temporary memory falls to a third or less."""

    def loss_fn(adapters, base, batch, key):
        hidden = batch.examples["x"]
        for _ in range(4):
            hidden = jnp.tanh(hidden @ adapters.head)
        return hidden.sum(), {}

    batch = Batch({"x": jnp.ones((2048, 128))}, jnp.ones(2048, bool))
    args = Adapters({}, jnp.ones((128, 128))), {}, batch

    def temporary(fn):
        grad = jax.jit(jax.grad(lambda *a: fn(*a, None)[0]))
        return grad.lower(*args).compile().memory_analysis().temp_size_in_bytes

    kept = 4 * 2048 * 128 * 4  # bytes of four hidden layers
    assert temporary(loss_fn) >= kept
    assert temporary(accumulate(loss_fn, 2048 // 8)) < kept / 3


@pytest.mark.slow
def test_methods_do_not_notice():
    """A round of H2Tune, whose distillation reads the logits, ends where the whole batches end."""
    method = h2.h2tune(learning_rate=1e-2, warmup_rounds=0, lambda_distil=1.0)
    ends = []
    for part_size in (4, 2):
        specs = tuple(
            dataclasses.replace(spec, loss_fn=accumulate(spec.loss_fn, part_size))
            for spec in toy.make_specs()[:1]
        )
        bases, data = toy.make_bases()[:1], toy.make_data(specs)
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        round_fn = h2.make_round(method, specs, client_axis="scan")
        state, metrics = round_fn(state, bases, data, None, None, method.hyper, toy.SEED)
        ends.append((state, metrics.clients))
    # Adam's first steps divide by gradients' sizes, which magnifies rounding.
    toy.assert_trees_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["logit", "log_likelihood"])
def test_layers_are_scored_as_by_the_plain_loss(target):
    """Fed-HeLLo scores by batches of one example."""
    spec = toy.make_specs()[0]
    factors = init_factors(spec, jax.random.key(0))
    factors = jax.tree.map(lambda leaf: leaf + 0.1, factors)
    head = spec.init_head_fn(jax.random.key(1))

    def scores(loss_fn):
        own = dataclasses.replace(spec, loss_fn=loss_fn)
        rest = factors, head, toy.server_set()[0], target
        return jax.jit(lambda base: layer_scores(own, base, *rest))(toy.make_bases()[0])

    np.testing.assert_array_equal(scores(accumulate(spec.loss_fn, 2)), scores(spec.loss_fn))


def test_refusals():
    with pytest.raises(FederationError, match="part_size must be at least 1, got 0"):
        accumulate(lambda *args: (jnp.zeros(()), {}), 0)

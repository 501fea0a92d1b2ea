"""From a model's forward function to the loss function that a method trains with.

`forward(base, sites, head, examples, key)` gives logits; key None means no dropout. What a task
reads of `batch.examples`:

    classification   labels i32[B]                                    logits [B, V]
    regression       targets f32[B]                                   outputs [B] or [B, 1]
    causal_lm        input_ids i32[B, T], answer_mask bool[B, T]      logits [B, T, V]
    multiple_choice  input_ids i32[B, Ch, T], answer_mask bool[B, Ch, T], labels i32[B]
                                                                      logits [B * Ch, T, V]

The forward function is given all of `examples`; for multiple choice without the labels, and with
the choices flattened into the rows.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from h2tune_jax.tasks import losses, metrics
from h2tune_jax.types import (
    Adapters,
    Array,
    Batch,
    FederationError,
    Metrics,
    PyTree,
    near_match,
)

Forward = Callable[[PyTree, Any, PyTree, dict[str, Array], Array | None], Array]
LossFn = Callable[[Adapters, PyTree, Batch, Array | None], tuple[Array, Metrics]]
EvaluateFn = Callable[[Adapters, PyTree, dict[str, Array], Array], dict[str, Array]]

TASKS = ("classification", "regression", "causal_lm", "multiple_choice")
_FIELDS = {
    "classification": ("labels",),
    "regression": ("targets",),
    "causal_lm": ("input_ids", "answer_mask"),
    "multiple_choice": ("input_ids", "answer_mask", "labels"),
}


def make_loss_fn(
    forward: Forward, task: str, *, normalise: Literal["length", "sum"] = "length"
) -> LossFn:
    """Build `loss_fn(adapters, base, batch, key) -> (loss, metrics)` for a task.

    Args:
      forward: the model; see above.
      task: one of `TASKS`.
      normalise: how multiple choice scores an answer; see `losses.multiple_choice`.
    """
    _check_task(task)

    def loss_fn(
        adapters: Adapters, base: PyTree, batch: Batch, key: Array | None
    ) -> tuple[Array, Metrics]:
        examples, mask = batch.examples, batch.mask
        logits = _run(forward, task, adapters, base, examples, key)
        if task == "classification":
            return losses.classification(logits, examples["labels"], mask)
        if task == "regression":
            return losses.regression(logits, examples["targets"], mask)
        text = examples["input_ids"], examples["answer_mask"]
        if task == "causal_lm":
            return losses.causal_lm(logits, *text, mask)
        return losses.multiple_choice(logits, *text, examples["labels"], mask, normalise=normalise)

    return loss_fn


def accumulate(loss_fn: LossFn, part_size: int) -> LossFn:
    """Compute a loss function part by part, so that only one part's activations live at once.

    A batch is cut into parts of `part_size` rows, one after the other; each is computed again in the
    backward pass. What is fixed is their size, not their number: training, evaluation and prediction
    call one loss function with batches of any size. The last part is filled up with rows that are
    masked out; a batch that fits into one part is computed as it is. Parts weigh by what their loss
    counts (`positions`, else the mask), so loss, metrics, `logits`, `positions` and every gradient equal
    the whole batch's to rounding. Dropout keys differ from part to part.
    """
    if part_size < 1:
        raise FederationError(f"part_size must be at least 1, got {part_size}")

    def accumulated(
        adapters: Adapters, base: PyTree, batch: Batch, key: Array | None
    ) -> tuple[Array, Metrics]:
        size = batch.mask.shape[0]
        if size <= part_size:
            return loss_fn(adapters, base, batch, key)
        num_parts = -(-size // part_size)
        parts = jax.tree.map(
            lambda leaf: leaf.reshape(num_parts, part_size, *leaf.shape[1:]),
            _fill_up(batch, num_parts * part_size - size),
        )

        @jax.checkpoint
        def one(part: Batch, place: Array) -> tuple[Array, Array, Metrics]:
            own_key = None if key is None else jax.random.fold_in(key, place)
            loss, seen = loss_fn(adapters, base, part, own_key)
            counted = jnp.sum(seen.get("positions", part.mask)).astype(loss.dtype)
            return loss, counted, seen

        def visit(carry: None, x: tuple[Batch, Array]) -> tuple[None, tuple]:
            return carry, one(*x)

        places = jnp.arange(num_parts, dtype=jnp.int32)
        _, (loss, counted, seen) = jax.lax.scan(visit, None, (parts, places))
        share = counted / jnp.maximum(jnp.sum(counted), 1)

        def mean(values: Array) -> Array:  # [M] -> []
            if not jnp.issubdtype(values.dtype, jnp.floating):
                values = values.astype(share.dtype)
            # A part in which nothing counts may not be finite: 0 * nan is nan.
            zero = jnp.zeros_like(values)
            return jnp.sum(jnp.where(share > 0, values * share.astype(values.dtype), zero))

        metrics = {}
        for name, value in seen.items():
            whole = name in ("logits", "positions")
            metrics[name] = value.reshape(-1, *value.shape[2:])[:size] if whole else mean(value)
        return mean(loss), metrics

    return accumulated


def _fill_up(batch: Batch, spare: int) -> Batch:
    """Add rows that do not count: repeats of the last, which no model answers with NaN."""
    if spare == 0:
        return batch
    repeat = lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], spare, axis=0)])
    mask = jnp.concatenate([batch.mask, jnp.zeros(spare, bool)])
    return Batch(jax.tree.map(repeat, batch.examples), mask)


def make_evaluate_fn(
    forward: Forward,
    task: str,
    *,
    batch_size: int,
    normalise: Literal["length", "sum"] = "length",
) -> EvaluateFn:
    """Build `evaluate(adapters, base, examples, num_examples) -> metrics` over a whole test set.

    `examples` has leaves [n, ...] of which the first `num_examples` count. The metrics are scalars:

        classification, multiple_choice   accuracy, macro_f1
        regression                        spearman, mse
        causal_lm                         perplexity, token_accuracy
    """
    _check_task(task)
    loss_fn = make_loss_fn(forward, task, normalise=normalise)

    def evaluate(
        adapters: Adapters, base: PyTree, examples: dict[str, Array], num_examples: Array
    ) -> dict[str, Array]:
        def measure(batch: Batch) -> tuple[PyTree, PyTree]:
            if task == "causal_lm":
                logits = _run(forward, task, adapters, base, batch.examples, None)
                text = batch.examples["input_ids"], batch.examples["answer_mask"]
                return metrics.sum_tokens(logits, *text, batch.mask), ()
            _, seen = loss_fn(adapters, base, batch, None)
            logits = seen["logits"]
            if task == "regression":
                return (), logits[:, 0].astype(jnp.float32)
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            labels, size = batch.examples["labels"], logits.shape[-1]
            return metrics.count_confusion(chosen, labels, batch.mask, num_classes=size), ()

        sums, outputs = metrics.scan_batches(measure, examples, num_examples, batch_size=batch_size)
        if task == "causal_lm":
            return {
                "perplexity": metrics.perplexity(sums),
                "token_accuracy": metrics.token_accuracy(sums),
            }
        if task == "regression":
            targets = examples["targets"]
            mask = jnp.arange(targets.shape[0]) < num_examples
            mse, _ = losses.regression(outputs, targets, mask)
            return {"spearman": metrics.spearman(outputs, targets, mask), "mse": mse}
        return {"accuracy": metrics.accuracy(sums), "macro_f1": metrics.macro_f1(sums)}

    return evaluate


def forward_of(model: Any, task: str) -> Forward:
    """Give the forward function that a task needs of a `models.Model`.

    Classification and regression (one label) read its `classify_fn`, the others its `logits_fn`.
    """
    _check_task(task)
    if task in ("classification", "regression"):
        return lambda base, sites, head, examples, key: model.classify_fn(
            base, sites, head, examples, key=key
        )
    return lambda base, sites, head, examples, key: model.logits_fn(base, sites, examples, key=key)


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise FederationError(f"no task is called {task!r}; {near_match(task, TASKS)}")


def _run(
    forward: Forward,
    task: str,
    adapters: Adapters,
    base: PyTree,
    examples: dict[str, Array],
    key: Array | None,
) -> Array:
    for field in _FIELDS[task]:
        if field not in examples:
            raise FederationError(
                f"task {task!r} needs the field {field!r}; the examples have {sorted(examples)}"
            )
    if task != "multiple_choice":
        return forward(base, adapters.sites, adapters.head, examples, key)
    lead = examples["input_ids"].shape[:2]
    flat = jax.tree.map(
        lambda leaf: leaf.reshape(-1, *leaf.shape[2:]),
        {name: leaf for name, leaf in examples.items() if name != "labels"},
    )
    logits = forward(base, adapters.sites, adapters.head, flat, key)
    return logits.reshape(*lead, *logits.shape[1:])

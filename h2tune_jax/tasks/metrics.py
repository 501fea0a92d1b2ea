"""Metrics over a whole test set, from sums that add up over batches and over clients.

    sums, outputs = scan_batches(fn, examples, num_examples, batch_size=32)

where `fn(batch)` gives a tree of sums and a tree of outputs a row. Everything is pure and may be
mapped over clients. A metric over no example at all is NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.tasks.losses import cross_entropy, shift
from h2tune_jax.types import Array, Batch, PyTree


class TokenSums(NamedTuple):
    """What perplexity and token accuracy are made of."""

    nll: Array  # f32[], summed over tokens
    num_correct: Array  # i32[]
    num_tokens: Array  # i32[]


def scan_batches(
    fn: Callable[[Batch], tuple[PyTree, PyTree]],
    examples: PyTree,
    num_examples: Array,
    *,
    batch_size: int,
) -> tuple[PyTree, PyTree]:
    """Add up a function's sums over all batches and string its outputs together.

    Args:
      fn: batch -> (sums, outputs): arrays that add up over batches, and leaves [B, ...].
      examples: leaves [n, ...].
      num_examples: i32[], the rows beyond are padding.
      batch_size: B; the last batch is filled up with rows that are masked out.

    Returns:
      The sums, and the outputs with leaves [n, ...]; outputs of padded rows mean nothing.
    """
    size = jax.tree.leaves(examples)[0].shape[0]
    num_batches = -(-size // batch_size)

    def read(step: Array) -> Batch:
        place = step * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        rows = jnp.minimum(place, size - 1)
        return Batch(jax.tree.map(lambda leaf: leaf[rows], examples), place < num_examples)

    def add(sums: PyTree, step: Array) -> tuple[PyTree, PyTree]:
        more, outputs = fn(read(step))
        return jax.tree.map(jnp.add, sums, more), outputs

    steps = jnp.arange(num_batches, dtype=jnp.int32)
    shapes, _ = jax.eval_shape(lambda: fn(read(steps[0])))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, outputs = jax.lax.scan(add, zeros, steps)
    join = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:size]
    return sums, jax.tree.map(join, outputs)


def count_confusion(
    predictions: Array,  # i32[B]
    labels: Array,  # i32[B]
    mask: Array,  # bool[B]
    *,
    num_classes: int,
) -> Array:  # i32[V, V]
    """Count examples by (label, prediction); these counts add up over batches.

    A pair with either part outside [0, V) is not counted: refuse such labels when reading them.
    """
    pair = labels * num_classes + predictions
    inside = (labels >= 0) & (labels < num_classes)
    inside &= (predictions >= 0) & (predictions < num_classes)
    # What is not counted goes into one more bin, which is cut off.
    index = jnp.where(mask & inside, pair, num_classes * num_classes)
    counts = jnp.zeros(num_classes * num_classes + 1, jnp.int32).at[index].add(1)
    return counts[:-1].reshape(num_classes, num_classes)


def accuracy(confusion: Array) -> Array:
    """Return the share of right predictions, of counts i32[V, V]."""
    return jnp.trace(confusion).astype(jnp.float32) / jnp.sum(confusion).astype(jnp.float32)


def macro_f1(confusion: Array) -> Array:
    """Return the mean F1 over the classes that occur among labels or predictions.

    F1 of a class is 2 hits / (its labels + its predictions).
    """
    hits = jnp.diagonal(confusion).astype(jnp.float32)
    either = (jnp.sum(confusion, axis=0) + jnp.sum(confusion, axis=1)).astype(jnp.float32)
    occurs = either > 0
    f1 = jnp.where(occurs, 2.0 * hits / jnp.where(occurs, either, 1.0), 0.0)
    return jnp.sum(f1) / jnp.sum(occurs).astype(jnp.float32)


def sum_tokens(
    logits: Array,  # [B, T, V]
    tokens: Array,  # i32[B, T]
    answer_mask: Array,  # bool[B, T]
    mask: Array,  # bool[B]
) -> TokenSums:
    """Sum the negative log-likelihood of the answers' tokens, and count them."""
    targets, positions = shift(tokens, answer_mask, mask)
    safe = jnp.where(positions[..., None], logits.astype(jnp.float32), 0.0)
    nll = jnp.where(positions, cross_entropy(safe, targets, positions), 0.0)
    hits = (jnp.argmax(safe, axis=-1) == targets) & positions
    return TokenSums(
        jnp.sum(nll),
        jnp.sum(hits).astype(jnp.int32),
        jnp.sum(positions).astype(jnp.int32),
    )


def perplexity(sums: TokenSums) -> Array:
    """Return exp of the mean negative log-likelihood a token."""
    return jnp.exp(sums.nll / sums.num_tokens.astype(jnp.float32))


def token_accuracy(sums: TokenSums) -> Array:
    """Return the share of tokens whose likeliest prediction is right."""
    return sums.num_correct.astype(jnp.float32) / sums.num_tokens.astype(jnp.float32)


def spearman(predictions: Array, targets: Array, mask: Array) -> Array:
    """Return the rank correlation of predictions f32[n] and targets f32[n] where the mask is set.

    Ties share their mean rank. It needs all predictions at once: collect them with `scan_batches`.
    NaN where either side is constant, or where a counted value is NaN.
    """
    x, y = rank(predictions, mask), rank(targets, mask)
    count = jnp.sum(mask).astype(jnp.float32)
    # The mean rank is known, so the sums need no second pass over the data.
    centre = (count + 1.0) / 2.0
    dx, dy = (jnp.where(mask, r - centre, 0.0) for r in (x, y))
    # Ranks reach n: dividing by it keeps the squares small.
    dx, dy = dx / count, dy / count
    result = jnp.sum(dx * dy) / (jnp.sqrt(jnp.sum(dx * dx)) * jnp.sqrt(jnp.sum(dy * dy)))
    broken = mask & (jnp.isnan(predictions) | jnp.isnan(targets))
    return jnp.where(jnp.any(broken), jnp.nan, result)


def rank(values: Array, mask: Array) -> Array:
    """Return ranks f32[n] from 1 among the values where the mask is set; ties share the mean."""
    count = jnp.sum(mask).astype(jnp.int32)
    ordered = jnp.sort(jnp.where(mask, values.astype(jnp.float32), jnp.inf))
    below = jnp.searchsorted(ordered, values.astype(jnp.float32), side="left")
    # A counted +inf must not be ranked among the padding, which sorts like it.
    upto = jnp.minimum(jnp.searchsorted(ordered, values.astype(jnp.float32), side="right"), count)
    return (below + upto + 1).astype(jnp.float32) / 2.0

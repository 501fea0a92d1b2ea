"""Losses on logits, and what a loss function reports beside them.

Each returns `(loss, metrics)`: the mean over what counts in float32, and a dict with the task's
metric on this batch, `logits` [..., V], and `positions`, the places in them that the loss counts.
What does not count, padded rows and padded tokens, changes neither of the two nor any gradient, not
even where its logits are not finite. A batch in which nothing counts has loss 0.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from h2tune_jax.types import Array, Metrics

# The score of a choice that only fills up: finite, so that differences of scores stay finite too.
_NEVER = -1e9


def classification(logits: Array, labels: Array, mask: Array) -> tuple[Array, Metrics]:
    """Cross-entropy of one label an example.

    Args:
      logits: [B, V].
      labels: i32[B] in [0, V); a counted label outside makes the loss NaN.
      mask: bool[B].

    Returns:
      The loss, and `accuracy`, `logits`, `positions`.
    """
    safe = jnp.where(mask[:, None], logits.astype(jnp.float32), 0.0)
    loss = average(cross_entropy(safe, labels, mask), mask)
    accuracy = average((jnp.argmax(safe, axis=-1) == labels).astype(jnp.float32), mask)
    return loss, {"accuracy": accuracy, "logits": logits, "positions": mask}


def regression(outputs: Array, targets: Array, mask: Array) -> tuple[Array, Metrics]:
    """Mean squared error.

    Args:
      outputs: [B] or [B, 1].
      targets: f32[B].
      mask: bool[B].

    Returns:
      The loss, and `mae` (the mean absolute error), `logits` and `positions`. The logits are the
      outputs as [B, 1]: a softmax over them is constant, so distillation by KL adds nothing here.
    """
    flat = outputs.reshape(mask.shape)
    safe = jnp.where(mask, flat.astype(jnp.float32), 0.0)
    error = safe - jnp.where(mask, targets.astype(jnp.float32), 0.0)
    mae = average(jnp.abs(error), mask)
    metrics = {"mae": mae, "logits": flat[:, None], "positions": mask}
    return average(jnp.square(error), mask), metrics


def causal_lm(
    logits: Array, tokens: Array, answer_mask: Array, mask: Array
) -> tuple[Array, Metrics]:
    """Next-token cross-entropy over the tokens of the answer, averaged over all of them.

    Position t predicts token t + 1. A first token that belongs to the answer has nothing before it
    and is not counted.

    Args:
      logits: [B, T, V].
      tokens: i32[B, T].
      answer_mask: bool[B, T], the tokens that belong to the answer.
      mask: bool[B].

    Returns:
      The loss, and `token_accuracy`, `logits`, `positions`.
    """
    targets, positions = shift(tokens, answer_mask, mask)
    safe = jnp.where(positions[..., None], logits.astype(jnp.float32), 0.0)
    loss = average(cross_entropy(safe, targets, positions), positions)
    hits = (jnp.argmax(safe, axis=-1) == targets).astype(jnp.float32)
    metrics = {
        "token_accuracy": average(hits, positions),
        "logits": logits,
        "positions": positions,
    }
    return loss, metrics


def multiple_choice(
    logits: Array,
    tokens: Array,
    answer_mask: Array,
    labels: Array,
    mask: Array,
    *,
    normalise: Literal["length", "sum"] = "length",
) -> tuple[Array, Metrics]:
    """Cross-entropy over the choices, each scored by the log-likelihood of its answer.

    A choice without an answer token is padding and cannot be chosen.

    Args:
      logits: [B, Ch, T, V], one text a choice.
      tokens: i32[B, Ch, T].
      answer_mask: bool[B, Ch, T], the tokens that belong to the choice's answer.
      labels: i32[B], the right choice.
      mask: bool[B].
      normalise: "length" scores by the mean over the answer's tokens, "sum" by their sum.

    Returns:
      The loss, and `accuracy`, `logits` (the scores [B, Ch]), `positions`.
    """
    scores = score_choices(logits, tokens, answer_mask, mask, normalise=normalise)
    return classification(scores, labels, mask)


def score_choices(
    logits: Array,  # [B, Ch, T, V]
    tokens: Array,  # i32[B, Ch, T]
    answer_mask: Array,  # bool[B, Ch, T]
    mask: Array,  # bool[B]
    *,
    normalise: Literal["length", "sum"] = "length",
) -> Array:  # f32[B, Ch]
    """Return every choice's log-likelihood; see `multiple_choice`."""
    if normalise not in ("length", "sum"):
        raise ValueError(f"normalise must be 'length' or 'sum', got {normalise!r}")
    targets, positions = shift(tokens, answer_mask, mask)
    safe = jnp.where(positions[..., None], logits.astype(jnp.float32), 0.0)
    nll = jnp.where(positions, cross_entropy(safe, targets, positions), 0.0)
    count = jnp.sum(positions, axis=-1)
    score = -jnp.sum(nll, axis=-1)
    if normalise == "length":
        score = score / jnp.maximum(count, 1).astype(jnp.float32)
    return jnp.where(count > 0, score, _NEVER)


def shift(tokens: Array, answer_mask: Array, mask: Array) -> tuple[Array, Array]:
    """Return the next token of each position [B, ..., T], and which positions predict an answer."""
    ahead = lambda leaf: jnp.concatenate([leaf[..., 1:], jnp.zeros_like(leaf[..., :1])], axis=-1)
    rows = mask.reshape(*mask.shape, *(1,) * (tokens.ndim - mask.ndim))
    return ahead(tokens), ahead(answer_mask) & rows


def cross_entropy(logits: Array, labels: Array, mask: Array) -> Array:
    """Return the negative log-likelihood f32[...] of labels i32[...] under logits f32[..., V].

    NaN where a counted label lies outside [0, V).
    """
    size = logits.shape[-1]
    index = jnp.where(mask, labels, 0)
    known = (index >= 0) & (index < size)
    picked = jnp.take_along_axis(logits, jnp.clip(index, 0, size - 1)[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.where(known, nll, jnp.nan)


def average(values: Array, mask: Array) -> Array:
    """Return the mean of values f32[...] where the mask is set; 0 where it is set nowhere."""
    total = jnp.sum(jnp.where(mask, values, 0.0))
    return total / jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)

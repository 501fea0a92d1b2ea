"""The regularisers of H2Tune's two halves."""

import jax
import jax.numpy as jnp

from h2tune_jax.adapters import triple
from h2tune_jax.types import Array, Batch, Metrics, at_least_float32


def safe_norm(rows: Array) -> Array:
    """2-norms of [m, n] along the last axis, with subgradient 0 at 0 (JAX's own is nan there)."""
    squares = jnp.square(rows).sum(axis=-1)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def kl_divergence(target_logits: Array, logits: Array) -> Array:
    """KL(softmax(target) || softmax(logits)) along the last axis."""
    target = jax.nn.log_softmax(target_logits)
    return (jnp.exp(target) * (target - jax.nn.log_softmax(logits))).sum(axis=-1)


def norm_term(core: Array, scores: Array | None, relation: Array) -> Array:
    """mean(|T_s|, |S_s| of all sites, |P|): one number a site for T, one for S, one for P."""
    sites = core.shape[0] * core.shape[1]
    norms = [safe_norm(core.reshape(sites, -1))]
    if scores is not None:
        norms.append(safe_norm(scores.reshape(sites, -1)))
    norms.append(safe_norm(relation.reshape(1, -1)))
    return jnp.concatenate(norms).mean()


def keep_term(last_middle: Array, core: Array, index: Array, trained: Array) -> Array:
    """Mean over sites of KL(softmax(T_last) || softmax(T)), flattened; 0 at a first participation.

    T_last is the client's M from the end of its previous local training, at today's indices.
    """
    last = triple.core(last_middle, index)
    flat = lambda core: core.reshape(core.shape[0] * core.shape[1], -1)
    return jnp.where(trained, kl_divergence(flat(last), flat(core)).mean(), 0)


def distil_term(teacher: Array, metrics: Metrics, batch: Batch, average: str) -> Array:
    """KL(softmax(z_1) || softmax(z)) over the positions that the loss counts.

    `average` is "positions" (the mean over them) or "batch" (their sum by the number of examples).
    A logit that is not finite has no share of a softmax and no gradient: a loss function may mask classes
    out by -inf, and what it does not count may be anything.
    """
    wide = at_least_float32(
        metrics["logits"].dtype
    )  # log-probabilities of 16 bits differ by rounding
    teacher, logits = (z.astype(wide) for z in (teacher, metrics["logits"]))
    positions = metrics.get("positions", batch.mask)
    missing = logits.ndim - 1 - positions.ndim
    weights = positions.reshape(*positions.shape, *(1,) * missing).astype(logits.dtype)
    weights = jnp.broadcast_to(weights, logits.shape[:-1])
    counted = weights.sum() if average == "positions" else batch.mask.sum().astype(logits.dtype)
    # What goes in, not what comes out: 0 * nan is nan, and so is its derivative. So low a logit has a share
    # of 0, and two of them differ by what is finite. (Where a counted one is nan, so is the task's loss.)
    low = jnp.finfo(logits.dtype).min / 2
    teacher, logits = (jnp.where(jnp.isfinite(z), z, low) for z in (teacher, logits))
    total = (weights * kl_divergence(teacher, logits)).sum()
    return total / jnp.where(counted > 0, counted, 1)

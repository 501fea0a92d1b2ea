"""How much a layer's adapter matters: a diagonal empirical Fisher on a small labelled set.

Per example the gradient of a target is squared; the mean over examples is the diagonal. A layer's score
is the Frobenius norm of each of its factors' diagonals, summed.
"""

import jax
import jax.numpy as jnp

from h2tune_jax.methods.lora import Parts, assemble
from h2tune_jax.types import Array, Batch, CohortSpec, FederationError, PyTree

TARGETS = ("logit", "log_likelihood")


def layer_scores(
    spec: CohortSpec,
    base: PyTree,
    factors: Parts,  # "a", "b"
    head: PyTree,
    examples: PyTree,  # leaves [n, ...], as the cohort's loss function reads them
    target: str,
) -> Array:  # f32[Li]
    """Score every layer. One example after the other: no more than one gradient exists at once.

    `log_likelihood` squares the gradient of the loss, `logit` that of the true label's logit, as the
    public code does. The latter is read off a cross-entropy, logsumexp(logits) - loss, so it needs a loss
    function that reports `logits`; over the positions that count it is their mean. Batches have one
    example, which a loss function that takes its batches in parts (`accumulate`) computes whole.
    """

    def objective(factors: Parts, example: PyTree) -> Array:
        batch = Batch(jax.tree.map(lambda leaf: leaf[None], example), jnp.ones(1, bool))
        loss, metrics = spec.loss_fn(assemble(spec, {**factors, "head": head}), base, batch, None)
        if target == "log_likelihood":
            return loss
        if "logits" not in metrics:
            raise FederationError(
                f"cohort {spec.name!r}: loss_fn reports no 'logits', which fisher 'logit' needs"
            )
        if metrics["logits"].shape[-1] < 2:
            raise FederationError(
                f"cohort {spec.name!r}: fisher 'logit' reads a class's logit off a cross-entropy, and "
                "loss_fn reports a single one (regression?); take fisher='log_likelihood'"
            )
        counted = metrics.get("positions", batch.mask)
        # What does not count may be anything, infinities included.
        logits = jnp.where(counted[..., None], metrics["logits"].astype(loss.dtype), 0)
        total = jnp.where(counted, jax.nn.logsumexp(logits, axis=-1), 0).sum()
        return total / jnp.maximum(counted.sum(), 1).astype(loss.dtype) - loss

    def add(sums: Parts, example: PyTree) -> tuple[Parts, None]:
        grads = jax.grad(objective)(factors, example)
        square = lambda total, grad: total + jnp.square(grad.astype(total.dtype))
        return jax.tree.map(square, sums, grads), None

    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), factors)
    sums, _ = jax.lax.scan(add, start, examples)
    count = jax.tree.leaves(examples)[0].shape[0]
    norms = [
        jnp.linalg.norm((leaf / count).reshape(leaf.shape[0], -1), axis=1)
        for leaf in jax.tree.leaves(sums)
    ]
    return jnp.stack(norms).sum(axis=0)

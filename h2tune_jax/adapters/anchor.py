"""Anchored bases: factors of different models that mean the same, fitted once on public text.

A reference model has random orthonormal factors A_ref [Dr, R] and B_ref [R, Fr] at a site. Another
model's are fitted from the activations of both on the same texts, as Co-LoRA does (FedMosaic, ICLR
2026): A by ridge regression and its polar factor, B by the map of canonical correlation analysis. It
departs from Co-LoRA in that B comes of covariances, not of Gram matrices with an absolute 1e-4 on the
diagonal, that ridges are relative to the activations' mean variance, and that inputs are centred, too.
Rows of the activations are aligned: the same token, or the mean over the same sentence.
"""

import jax
import jax.numpy as jnp

from h2tune_jax.precision import exact
from h2tune_jax.types import Array


def orthonormal(key: Array, width: int, size: int, dtype=jnp.float32) -> Array:  # [width, R]
    """Draw orthonormal columns, uniformly; where there are more columns than rows, unit columns."""
    draw = jax.random.normal(key, (width, size), jnp.float32)
    if size > width:
        return (draw / jnp.linalg.norm(draw, axis=0, keepdims=True)).astype(dtype)
    q, r = jnp.linalg.qr(draw)
    return (q * jnp.sign(jnp.diagonal(r))[None, :]).astype(dtype)


@exact
def fit_inputs(
    x: Array,  # [n, D]
    reference: Array,  # [n, Dr]
    a_ref: Array,  # [Dr, R]
    *,
    ridge: float = 1e-3,
) -> tuple[Array, Array]:  # [D, R], []
    """Find orthonormal columns A for which x A is nearest to reference A_ref.

    Ridge regression on centred activations (`ridge` relative to their mean square), then the polar
    factor. Returns A and the share of the target's variance that x A explains, up to one scale.
    """
    x, target = centre(x), centre(reference) @ a_ref.astype(jnp.float32)
    gram = x.T @ x
    weight = ridge * jnp.trace(gram) / gram.shape[0] + 1e-12
    fitted = jnp.linalg.solve(
        gram + weight * jnp.eye(gram.shape[0], dtype=gram.dtype), x.T @ target
    )
    left, _, right = jnp.linalg.svd(fitted, full_matrices=False)
    a = left @ right
    return a, explained(x @ a, target)


@exact
def fit_outputs(
    y: Array,  # [n, F]
    reference: Array,  # [n, Fr]
    b_ref: Array,  # [R, Fr]
    *,
    ridge: float = 1e-4,
) -> tuple[Array, Array]:  # [R, F], []
    """Carry B_ref over by the CCA map: B^T = S_yy^(1/2) U V^T S_rr^(-1/2) B_ref^T.

    U and V are the singular vectors of S_yy^(-1/2) S_yr S_rr^(-1/2), S the covariances of centred
    activations with `ridge` (relative to their mean square) on the diagonal. Returns B and the mean
    canonical correlation.
    """
    y, reference = centre(y), centre(reference)

    def roots(z: Array) -> tuple[Array, Array]:
        gram = z.T @ z / z.shape[0]
        mean = jnp.trace(gram) / gram.shape[0]
        values, vectors = jnp.linalg.eigh(
            gram + (ridge * mean + 1e-12) * jnp.eye(gram.shape[0], dtype=gram.dtype)
        )
        root = jnp.sqrt(jnp.maximum(values, 1e-12))
        return (vectors * root[None, :]) @ vectors.T, (vectors / root[None, :]) @ vectors.T

    root, inverse = roots(y)
    _, reference_inverse = roots(reference)
    cross = inverse @ (y.T @ reference / y.shape[0]) @ reference_inverse
    left, correlations, right = jnp.linalg.svd(cross, full_matrices=False)
    carried = root @ left @ right @ reference_inverse @ b_ref.astype(jnp.float32).T
    rank = min(b_ref.shape[0], correlations.shape[0])
    return carried.T, correlations[:rank].mean()


def centre(rows: Array) -> Array:
    """Subtract the mean row, in float32."""
    rows = rows.astype(jnp.float32)
    return rows - rows.mean(axis=0, keepdims=True)


def explained(fitted: Array, target: Array) -> Array:
    """Share of the target's variance that a multiple of `fitted` explains."""
    across = jnp.vdot(fitted, target)
    both = jnp.vdot(fitted, fitted) * jnp.vdot(target, target)
    return jnp.where(both > 0, across * across / jnp.where(both > 0, both, 1), 0)

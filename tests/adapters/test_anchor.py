"""Anchored bases against what they are meant to recover, and against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2tune_jax.adapters import anchor


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def rotation(seed, size):
    return np.linalg.qr(draw(seed, size, size))[0]


@pytest.mark.parametrize(("width", "size"), [(8, 3), (8, 8), (3, 5)])
def test_orthonormal(width, size):
    basis = np.asarray(anchor.orthonormal(jax.random.key(0), width, size))
    assert basis.shape == (width, size)
    np.testing.assert_allclose(np.linalg.norm(basis, axis=0), 1, rtol=1e-5)
    if size <= width:
        np.testing.assert_allclose(basis.T @ basis, np.eye(size), atol=1e-5)


def test_a_rotated_model_gets_the_rotated_basis():
    # x_i = x_ref Q: the nearest A is Q^T A_ref, and it explains everything.
    reference, turn = draw(0, 200, 6), rotation(1, 6)
    a_ref = np.asarray(anchor.orthonormal(jax.random.key(2), 6, 3))
    a, quality = anchor.fit_inputs(jnp.asarray(reference @ turn), jnp.asarray(reference), a_ref)
    np.testing.assert_allclose(a, turn.T @ a_ref, atol=2e-2)
    np.testing.assert_allclose(quality, 1, atol=1e-3)


def test_a_wider_model_that_contains_the_reference_is_found():
    reference = draw(0, 300, 5)
    embed = np.linalg.qr(draw(1, 9, 5))[0].T  # orthonormal rows: x_i = x_ref E, E E^T = I
    a_ref = np.asarray(anchor.orthonormal(jax.random.key(2), 5, 2))
    wide = jnp.asarray(reference @ embed)
    a, quality = anchor.fit_inputs(wide, jnp.asarray(reference), a_ref)
    assert a.shape == (9, 2)
    np.testing.assert_allclose(np.asarray(a).T @ a, np.eye(2), atol=1e-5)
    np.testing.assert_allclose(wide @ a, reference @ a_ref, atol=0.1)
    np.testing.assert_allclose(quality, 1, atol=1e-3)


@pytest.mark.parametrize("ridge", [None, 0.1])
def test_inputs_by_the_definition_in_float64(ridge):
    # Directions that differ a hundredfold in size, off the origin: so the ridge, the centring and the
    # polar factor all show.
    sizes = np.array([10.0, 4.0, 1.0, 0.3, 0.1])
    x = draw(0, 60, 5) * sizes @ rotation(1, 5) + draw(2, 5)
    reference = x @ draw(3, 5, 6) + 2 * draw(4, 60, 6) + draw(5, 6)
    a_ref = np.linalg.qr(draw(6, 6, 3))[0]
    options = {} if ridge is None else {"ridge": ridge}
    a, quality = anchor.fit_inputs(jnp.asarray(x), jnp.asarray(reference), a_ref, **options)

    def fit(x, relative):
        target = (reference - reference.mean(axis=0)) @ a_ref
        own = relative * np.trace(x.T @ x) / 5 * np.eye(5)
        left, _, right = np.linalg.svd(np.linalg.solve(x.T @ x + own, x.T @ target))
        return left[:, :3] @ right, target

    centred = x - x.mean(axis=0)
    expected, target = fit(centred, 1e-3 if ridge is None else ridge)
    np.testing.assert_allclose(a, expected, rtol=1e-3, atol=1e-4)
    along = np.sum(centred @ expected * target) ** 2
    share = along / np.sum(np.square(centred @ expected)) / np.sum(np.square(target))
    np.testing.assert_allclose(quality, share, rtol=1e-4)
    for other in (fit(centred, 0.0)[0], fit(centred, 1e-2)[0], fit(x, 1e-3)[0]):
        assert np.abs(other - expected).max() > 0.02


def test_unrelated_activations_explain_nothing():
    a_ref = anchor.orthonormal(jax.random.key(2), 6, 2)
    _, quality = anchor.fit_inputs(
        jnp.asarray(draw(0, 4000, 6)), jnp.asarray(draw(1, 4000, 6)), a_ref
    )
    assert quality < 0.01


def test_outputs_by_the_definition_in_float64():
    y, reference, b_ref = draw(0, 60, 5) @ draw(1, 5, 5), draw(2, 60, 7), draw(3, 3, 7)
    reference[:, :5] += y
    b, _ = anchor.fit_outputs(jnp.asarray(y), jnp.asarray(reference), jnp.asarray(b_ref))

    def power(matrix, exponent):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * values**exponent) @ vectors.T

    y, reference = y - y.mean(axis=0), reference - reference.mean(axis=0)
    cover = lambda z: z.T @ z / 60 + 1e-4 * np.trace(z.T @ z) / 60 / z.shape[1] * np.eye(z.shape[1])
    s_yy, s_rr = cover(y), cover(reference)
    m = power(s_yy, -0.5) @ (y.T @ reference / 60) @ power(s_rr, -0.5)
    u, _, vt = np.linalg.svd(m, full_matrices=False)
    expected = (power(s_yy, 0.5) @ u @ vt @ power(s_rr, -0.5) @ b_ref.T).T
    np.testing.assert_allclose(b, expected, rtol=2e-2, atol=2e-3)


def test_an_equal_model_keeps_the_reference_outputs():
    y, b_ref = draw(0, 200, 6), draw(1, 2, 6)
    b, quality = anchor.fit_outputs(jnp.asarray(y), jnp.asarray(y), jnp.asarray(b_ref))
    np.testing.assert_allclose(b, b_ref, atol=1e-2)
    np.testing.assert_allclose(quality, 1, atol=1e-2)

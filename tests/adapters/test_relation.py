"""Layer relations: columns that sum to one, mixing and its transpose, support."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from h2tune_jax import FederationError
from h2tune_jax.adapters import relation
from h2tune_jax.types import Places

DEPTHS = st.integers(1, 13)


@settings(deadline=None, max_examples=80)
@given(DEPTHS, DEPTHS)
def test_depth_interpolates(slots, layers):
    matrix = np.asarray(relation.depth(slots, layers), np.float64)
    assert matrix.shape == (slots, layers)
    np.testing.assert_allclose(matrix.sum(axis=0), 1, atol=1e-6)
    assert (matrix >= 0).all()
    assert ((matrix > 0).sum(axis=0) <= 2).all()
    # The mean slot of a layer is its relative depth.
    place = (matrix * np.arange(slots)[:, None]).sum(axis=0)
    expected = np.arange(layers) * (slots - 1) / max(layers - 1, 1)
    np.testing.assert_allclose(place, expected, atol=1e-5)
    if slots == layers:
        np.testing.assert_array_equal(matrix, np.eye(slots))


def test_depth_by_hand():
    np.testing.assert_allclose(
        relation.depth(3, 4),
        [[1, 1 / 3, 0, 0], [0, 2 / 3, 2 / 3, 0], [0, 0, 1 / 3, 1]],
        atol=1e-6,
    )
    np.testing.assert_array_equal(relation.depth(3, 1), [[1], [0], [0]])
    np.testing.assert_array_equal(relation.depth(1, 3), [[1, 1, 1]])
    np.testing.assert_array_equal(relation.depth(1, 1), [[1]])


def test_nearest_slots():
    for slots, layers, expected in (
        (6, 3, [0, 2, 5]),
        (6, 6, range(6)),
        (6, 1, [0]),
        (1, 4, [0] * 4),
    ):
        found = relation.nearest_slots(slots, relation.whole(layers))
        np.testing.assert_array_equal(found, list(expected))


def test_layers_keep_their_places_in_the_whole_model():
    places = Places((0, 1, 3, 5), 6)
    np.testing.assert_array_equal(relation.at_places(6, places), np.eye(6)[:, [0, 1, 3, 5]])
    np.testing.assert_array_equal(relation.nearest_slots(6, places), [0, 1, 3, 5])
    found = relation.nearest_layers(places, Places((0, 2, 5), 6))
    np.testing.assert_array_equal(found, [0, 0, 1, 2])  # 1 is as near to 0 as to 2
    found = relation.nearest_layers(relation.whole(3), relation.whole(5))
    np.testing.assert_array_equal(found, [0, 2, 4])
    expected = [[1, 0.6, 0, 0], [0, 0.4, 0.8, 0], [0, 0, 0.2, 1]]  # at 0, 0.4, 1.2 and 2 of 3 slots
    np.testing.assert_allclose(relation.at_places(3, places), expected, atol=1e-6)


def test_mix_and_unmix_are_transposes():
    keys = jax.random.split(jax.random.key(0), 3)
    own = jax.random.normal(keys[0], (4, 3))
    shared, middle = jax.random.normal(keys[1], (4, 2, 5)), jax.random.normal(keys[2], (3, 2, 5))
    by_hand = sum(own[j, 1] * shared[j] for j in range(4))
    np.testing.assert_allclose(relation.mix(own, shared)[1], by_hand, rtol=1e-5)
    by_hand = sum(own[2, layer] * middle[layer] for layer in range(3))
    np.testing.assert_allclose(relation.unmix(own, middle)[2], by_hand, rtol=1e-5)
    np.testing.assert_allclose(
        np.vdot(relation.mix(own, shared), middle),
        np.vdot(shared, relation.unmix(own, middle)),
        rtol=1e-4,
    )
    check_grads(relation.mix, (own, shared), order=2, modes=["fwd", "rev"], atol=1e-2, rtol=1e-2)


def test_support_of_slots_and_entries():
    own = relation.depth(5, 2)  # slots 0 and 4 alone
    np.testing.assert_array_equal(relation.slot_support(own), [True, False, False, False, True])
    index = jnp.array([[[0, 3]], [[1, 2]]], jnp.int32)[..., None, :].reshape(2, 1, 2)
    # Two layers, one kind, and (for the sake of the test) two entries each of R = 2.
    entries = np.asarray(relation.entry_support(own, index, 2)).reshape(5, 4)
    np.testing.assert_array_equal(entries[0], [True, False, False, True])
    np.testing.assert_array_equal(entries[4], [False, True, True, False])
    assert not entries[1:4].any()


def test_a_slot_shared_by_two_layers_has_the_union_of_their_entries():
    own = relation.depth(1, 2)
    index = jnp.array([[[0]], [[3]]], jnp.int32)
    entries = np.asarray(relation.entry_support(own, index, 2)).reshape(4)
    np.testing.assert_array_equal(entries, [True, False, False, True])


def float64_cka(x, y):
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def test_cka_against_its_definition():
    rng = np.random.default_rng(0)
    client, reference = rng.normal(size=(3, 9, 4)), rng.normal(size=(2, 9, 6))
    grams = relation.gram(jnp.asarray(client, jnp.float32))
    reference_grams = relation.gram(jnp.asarray(reference, jnp.float32))
    matrix = relation.cka(grams, reference_grams)
    assert matrix.shape == (2, 3)
    scores = np.array([[float64_cka(x, y) for x in client] for y in reference])
    expected = np.exp(scores) / np.exp(scores).sum(axis=0)
    np.testing.assert_allclose(matrix, expected, rtol=1e-5)
    np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=1e-6)


def test_cka_with_more_slots_than_reference_layers_interpolates():
    rng = np.random.default_rng(0)
    grams = relation.gram(jnp.asarray(rng.normal(size=(3, 9, 4)), jnp.float32))
    reference = relation.gram(jnp.asarray(rng.normal(size=(2, 9, 6)), jnp.float32))
    matrix = np.log(relation.cka(grams, reference, num_slots=3))
    ends = np.log(relation.cka(grams, reference))
    # Up to each column's constant, the middle slot is halfway between the two layers.
    np.testing.assert_allclose(matrix[1] - matrix[0], (ends[1] - ends[0]) / 2, atol=1e-5)
    np.testing.assert_allclose(matrix[2] - matrix[0], ends[1] - ends[0], atol=1e-5)


def test_cka_of_constant_activations_is_zero_not_nan():
    flat = relation.gram(jnp.ones((1, 5, 3)))
    other = relation.gram(jax.random.normal(jax.random.key(0), (2, 5, 3)))
    np.testing.assert_array_equal(relation.cka(flat, other), [[0.5], [0.5]])


def test_cka_refuses_different_probes():
    with pytest.raises(FederationError, match="same probe"):
        relation.cka(jnp.zeros((2, 4, 4)), jnp.zeros((2, 5, 5)))


def test_random_is_bounded():
    matrix = np.asarray(relation.random(jax.random.key(0), 50, 4))
    assert np.abs(matrix).max() <= 0.5
    assert np.abs(matrix).max() > 0.45

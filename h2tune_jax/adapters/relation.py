"""Relation-guided layer alignment (H2Tune): which shared layer slot speaks to which layer of a client.

P [L, Li] is personal. Layer l of the client reads M[l] = sum_j P[j, l] G[j]; a slot j without support
(all of P[j, :] zero) takes no part in that client's upload.
"""

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.precision import exact
from h2tune_jax.types import Array, FederationError, Places, at_least_float32


def depth(num_slots: int, num_layers: int, dtype=jnp.float32) -> Array:  # [L, Li]
    """Interpolate linearly on relative depth; every column sums to 1.

    The identity when L = Li; a single layer, or a single slot, sits at relative depth 0.
    """
    return at_places(num_slots, whole(num_layers), dtype)


def at_places(num_slots: int, places: Places, dtype=jnp.float32) -> Array:  # [L, Li]
    """Interpolate as `depth` does, on the depth of the whole model that the layers were taken from."""
    matrix = np.zeros((num_slots, len(places.layers)))
    steps = max(places.depth - 1, 1)
    for layer, place in enumerate(places.layers):
        # The layer's place on the axis of slots, place * (L - 1) / (depth - 1), in exact integers.
        below, rest = divmod(place * (num_slots - 1), steps)
        matrix[below, layer] = 1 - rest / steps
        if rest:
            matrix[below + 1, layer] = rest / steps
    return jnp.asarray(matrix, dtype)


def whole(num_layers: int) -> Places:
    """Return the places of all layers of a model."""
    return Places(tuple(range(num_layers)), num_layers)


def nearest_slots(num_slots: int, places: Places) -> Array:  # i32[Li]
    """Return, for each layer, the slot nearest to it in relative depth."""
    exact = np.asarray(places.layers) * (num_slots - 1) / max(places.depth - 1, 1)
    return jnp.asarray(np.rint(exact), jnp.int32)


def nearest_layers(places: Places, others: Places) -> Array:  # i32[Li]
    """Return, for each layer of a model, the layer of another one nearest to it in relative depth.

    Of two as near, the earlier.
    """
    own = np.asarray(places.layers) * max(others.depth - 1, 1)
    theirs = np.asarray(others.layers) * max(places.depth - 1, 1)
    return jnp.asarray(np.abs(own[:, None] - theirs[None, :]).argmin(axis=1), jnp.int32)


def random(key: Array, num_slots: int, num_layers: int, dtype=jnp.float32) -> Array:  # [L, Li]
    """Draw U(+-1/sqrt Li), the reference code's start."""
    bound = num_layers**-0.5
    return jax.random.uniform(key, (num_slots, num_layers), dtype, -bound, bound)


@exact
def gram(activations: Array) -> Array:  # [Li, n, d] -> [Li, n, n]
    """Centred Gram matrices of a model's layer activations on a probe, one row a probe text.

    This is all that a client has to show of its activations for `cka`.
    """
    activations = activations.astype(at_least_float32(activations.dtype))
    x = activations - activations.mean(axis=1, keepdims=True)
    return jnp.einsum("lnd,lmd->lnm", x, x)


@exact
def cka(
    grams: Array,  # [Li, n, n]
    reference: Array,  # [Lr, n, n]
    *,
    num_slots: int | None = None,
    temperature: float = 1.0,
) -> Array:  # [L, Li]
    """Softmax over slots of the centred kernel alignment with a reference client's layers.

    Slots are the reference's layers; with another number of slots the alignments are interpolated to
    them on relative depth. Columns sum to 1.
    """
    if grams.shape[1:] != reference.shape[1:]:
        raise FederationError(
            f"cka: both sides need the same probe, got Gram matrices {grams.shape} and {reference.shape}"
        )
    inner = jnp.einsum("jnm,lnm->jl", reference, grams)
    norms = jnp.sqrt(jnp.einsum("jnm,jnm->j", reference, reference))
    own = jnp.sqrt(jnp.einsum("lnm,lnm->l", grams, grams))
    scale = norms[:, None] * own[None, :]
    alignment = jnp.where(scale > 0, inner / jnp.where(scale > 0, scale, 1), 0)
    if num_slots is not None and num_slots != reference.shape[0]:
        alignment = depth(reference.shape[0], num_slots, alignment.dtype).T @ alignment
    return jax.nn.softmax(alignment / temperature, axis=0)


@exact
def mix(relation: Array, shared: Array) -> Array:
    """M[l] = sum_j P[j, l] G[j], from P [L, Li] and G [L, ...] to M [Li, ...]."""
    return jnp.tensordot(relation, shared, axes=((0,), (0,)))


@exact
def unmix(relation: Array, middle: Array) -> Array:
    """G[j] = sum_l P[j, l] M[l], from P [L, Li] and M [Li, ...] to G [L, ...]: mix transposed."""
    return jnp.tensordot(relation, middle, axes=((1,), (0,)))


def support(relation: Array) -> Array:  # bool[L, Li]
    """Which slot speaks to which layer at all."""
    return relation != 0


def slot_support(relation: Array) -> Array:  # bool[L]
    """Which slots speak to any layer; the others take no part in the client's upload."""
    return support(relation).any(axis=1)


def entry_support(relation: Array, index: Array, size: int) -> Array:
    """Which entries of the shared matrices the client selected, through any layer of a slot.

    From P [L, Li] and index i32[Li, Ki, r*r] to bool[L, Ki, R, R].
    """
    num_layers, num_kinds, _ = index.shape
    flat = index.reshape(num_layers * num_kinds, -1)
    hit = jax.vmap(lambda i: jnp.zeros(size * size, bool).at[i].set(True))(flat)
    hit = hit.reshape(num_layers, num_kinds, size, size)
    # A slot counts an entry once however many of its layers selected it.
    return jnp.tensordot(support(relation).astype(jnp.float32), hit.astype(jnp.float32), axes=1) > 0

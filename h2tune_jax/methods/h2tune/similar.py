"""A mean of G for each client: those who are similar to it count more."""

import jax
import jax.numpy as jnp

from h2tune_jax import aggregate
from h2tune_jax.methods.h2tune.likeness import distance
from h2tune_jax.methods.h2tune.options import H2TuneOptions
from h2tune_jax.methods.h2tune.state import H2TuneServer, H2TuneUpload, kind_places
from h2tune_jax.precision import exact
from h2tune_jax.types import Array, Specs, at_least_float32


@exact
def similarity(
    specs: Specs, uploads: tuple[H2TuneUpload, ...], place: int, client: Array
) -> tuple[Array, ...]:  # f32[C] a cohort
    """Cosine of the matrices of one client of one cohort with those of all clients.

    Only entries that both sent are compared; where there are none, or only zeros, it is 0.
    """
    own, own_mask = _counting(uploads[place], client)
    own_kinds = specs[place].kinds
    found = []
    for spec, upload in zip(specs, uploads):
        common = [kind for kind in spec.kinds if kind in own_kinds]
        if not common:
            found.append(jnp.zeros(spec.num_clients, jnp.float32))
            continue
        ours = jnp.asarray([own_kinds.index(kind) for kind in common])
        here = jnp.asarray([spec.kinds.index(kind) for kind in common])
        mask = jnp.broadcast_to(upload.mask, upload.middle.shape)[:, :, here]
        theirs = jnp.where(mask, upload.middle[:, :, here].astype(jnp.float32), 0)
        mine = own[:, ours]
        over = lambda x, y: jnp.tensordot(x, y, axes=((1, 2, 3, 4), (0, 1, 2, 3)))
        norms = jnp.sqrt(over(mask.astype(jnp.float32), mine**2))
        norms = norms * jnp.sqrt(over(theirs**2, own_mask[:, ours].astype(jnp.float32)))
        cosine = over(theirs, mine) / jnp.where(norms > 0, norms, 1)
        found.append(jnp.where(norms > 0, cosine, 0))
    return tuple(found)


def alike(
    uploads: tuple[H2TuneUpload, ...], place: int, client: Array, heard: Array
) -> tuple[Array, ...]:  # f32[C] a cohort
    """How far the data of one client of one cohort is from everyone's beyond chance, negated.

    A client that has not been heard has not said anything of its data: it is as near to all.
    """
    own = jax.tree.map(lambda leaf: jnp.take(leaf, client, axis=0), uploads[place].signature)
    likeness = []
    for upload in uploads:
        assert upload.signature is not None  # everyone describes their data, or nobody
        beyond_chance = jnp.maximum(distance(own, upload.signature) - 1, 0)
        likeness.append(jnp.where(heard, -beyond_chance, 0))
    return tuple(likeness)


@exact
def hear(
    options: H2TuneOptions, specs: Specs, server: H2TuneServer, place: int, client: Array
) -> Array:  # T[L, Ki, R, R]
    """Mix what all clients have last sent for one of them, entry by entry over those who sent it.

    Client j weighs w_j exp(likeness_ij / temperature); a client that was never heard gets the plain
    mean. Where nobody was heard: what everyone starts from.
    """
    uploads = tuple(one.sent for one in server.latest)
    if options.by_data:
        heard = jnp.take(server.latest[place].weights, client) > 0
        likeness = alike(uploads, place, client, heard)
    else:
        likeness = similarity(specs, uploads, place, client)
    weights = tuple(one.weights for one in server.latest)
    weights = aggregate.shares_of_alike(likeness, weights, options.temperature)
    total = jnp.zeros_like(server.middle, dtype=at_least_float32(server.middle.dtype))
    share = jnp.zeros_like(total)
    for spec, upload, weight in zip(specs, uploads, weights):
        weight = weight.astype(total.dtype)
        mask = jnp.broadcast_to(upload.mask, upload.middle.shape)
        sent = jnp.where(mask, upload.middle.astype(total.dtype), 0)
        kinds = kind_places(specs, spec)
        total = total.at[:, kinds].add(jnp.tensordot(weight, sent, axes=1))
        share = share.at[:, kinds].add(jnp.tensordot(weight, mask.astype(total.dtype), axes=1))
    mean = aggregate.mean_or_keep(total, share, server.middle)
    return mean[:, kind_places(specs, specs[place])]


def _counting(upload: H2TuneUpload, client: Array) -> tuple[Array, Array]:  # [L, Ki, R, R] each
    """One client's matrices, zero where they do not count, and where they count."""
    middle = jnp.take(upload.middle, client, axis=0).astype(jnp.float32)
    mask = jnp.broadcast_to(jnp.take(upload.mask, client, axis=0), middle.shape)
    return jnp.where(mask, middle, 0), mask

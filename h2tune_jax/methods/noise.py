"""Clipped and noisy uploads, as client-level differential privacy asks for them, for any method.

DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963) with the noise added by the clients: with w the shared
part as downloaded and w_i as trained, a client uploads

    w + clipped(w_i - w) + N(0, (multiplier * clip)^2 I),    clipped(d) = d * min(1, clip / |d|).

Where an upload has a `mask`, as in `aggregate.weighted_part`, it says what is brought of the shared part
(H2Tune's selected entries, the columns that HetLoRA has not pruned): the rest adds nothing to the update's
norm, gets no noise, and is zero.

This is the mechanism alone. No budget (epsilon, delta) is accounted for here, and what stands beside the
shared part in an upload, such as that mask, is sent as it is.
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp

from h2tune_jax.check import check_not_negative, check_positive
from h2tune_jax.method import FederatedMethod
from h2tune_jax.types import Array, FederationError, PyTree, at_least_float32, fold_name


def noisy(method: FederatedMethod, *, clip: float, multiplier: float) -> FederatedMethod:
    """Wrap a method whose upload is its shared part as trained.

    `hyper` gets two further fields, `clip` and `noise_multiplier`. The shared part is found by the names
    in `method.shared`: fields of the download's common part (or, if it has no such fields, all of it)
    and of the upload.

    Args:
      method: what clients run; it must name its shared part.
      clip: the largest norm of a client's update, over all that is shared.
      multiplier: of the noise's standard deviation, in units of `clip`.
    """
    check_positive("clip", clip)
    check_not_negative("multiplier", multiplier)
    if not method.shared:
        raise FederationError(
            f"noisy: {method.name!r} names no shared part, of which a trained copy could be clipped"
        )
    if method.sends_change:
        raise FederationError(
            f"noisy: {method.name!r} uploads changes, and not its shared part as trained"
        )
    plain = type(method.hyper)
    if "noise_multiplier" in plain._fields:
        raise FederationError(f"noisy: the uploads of {method.name!r} are noisy already")
    dtype = jnp.result_type(float)
    further = jnp.asarray(clip, dtype), jnp.asarray(multiplier, dtype)
    fields = method.shared

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        args = spec, key, base, client, download, data, plain(*hyper[:-2]), round_index
        client, upload, metrics = method.client_update(*args, drift_fn=drift_fn)
        sent, received = _parts(upload, fields), _parts(download.common, fields)
        if jax.tree.structure(sent) != jax.tree.structure(received):
            raise FederationError(
                f"noisy: {method.name!r} does not upload what it was sent, so there is no update to clip"
            )
        mask = getattr(upload, "mask", None)
        moved = jax.tree.map(lambda new, old: new - old.astype(new.dtype), sent, received)
        moved = _add_noise(
            fold_name(key, "noise"),
            _clipped(_brought(moved, mask), hyper.clip),
            hyper.clip * hyper.noise_multiplier,
        )
        sent = jax.tree.map(lambda old, step: old.astype(step.dtype) + step, received, moved)
        return client, _with_parts(upload, fields, _brought(sent, mask)), metrics

    return method._replace(
        name=f"{method.name}+noise",
        hyper=_with_noise(plain)(*method.hyper, *further),
        client_update=client_update,
    )


def _parts(tree: PyTree, fields: tuple[str, ...]) -> PyTree:
    """The shared part of an upload or a download: by name, or all of it."""
    if all(hasattr(tree, field) for field in fields):
        return [getattr(tree, field) for field in fields]
    return [tree]


def _with_parts(tree: PyTree, fields: tuple[str, ...], parts: list) -> PyTree:
    if all(hasattr(tree, field) for field in fields):
        return tree._replace(**dict(zip(fields, parts)))
    return parts[0]


def _brought(parts: list, mask: PyTree) -> list:
    """Zero what an upload does not bring; without a mask it brings everything."""
    if mask is None:
        return parts
    return jax.tree.map(lambda leaf, here: jnp.where(here, leaf, 0), parts, [mask])


def _clipped(tree: PyTree, clip: Array) -> PyTree:
    """Shorten to the norm `clip`, taken over all leaves together."""
    leaves = [leaf.astype(at_least_float32(leaf.dtype)) for leaf in jax.tree.leaves(tree)]
    dtype = jnp.result_type(*leaves)
    square = jnp.stack([jnp.square(leaf).sum().astype(dtype) for leaf in leaves]).sum()
    limit = clip.astype(dtype)
    # No division where there is nothing to shorten: 0 / 0 is nan.
    long = square > jnp.square(limit)
    factor = jnp.where(long, limit / jnp.sqrt(jnp.where(long, square, 1)), 1)
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), tree)


def _add_noise(key: Array, tree: PyTree, scale: Array) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + scale.astype(leaf.dtype) * jax.random.normal(own, leaf.shape, leaf.dtype)
        for own, leaf in zip(keys, leaves)
    ]
    return treedef.unflatten(noisy)


@functools.cache
def _with_noise(plain: type) -> Any:
    """The method's own settings and the noise's; one class a method, so that programs are found again."""
    return collections.namedtuple(plain.__name__, (*plain._fields, "clip", "noise_multiplier"))

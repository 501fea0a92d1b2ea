"""What Co-LoRA's server and clients hold, what travels, and whom a client hears."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax import aggregate
from h2tune_jax.methods.latest import Latest
from h2tune_jax.precision import exact
from h2tune_jax.types import Array, PyTree, Specs, at_least_float32

Parts = dict[str, Any]
"""What travels of a client: "p", "q" by kind T[blocks, r, r], T[blocks, r], and of the other layers "a",
"b" by kind T[Li - blocks, D, r], T[Li - blocks, r, F] (no kind where every layer is aligned)."""


class CoLoraServer(NamedTuple):
    """The frozen factors, and what every client of the federation has last sent."""

    frozen: dict[str, Parts]  # by architecture: "a", "b" where layers meet, "start" elsewhere
    latest: tuple[Latest, ...]  # a cohort; what was sent is a `CoLoraUpload`


class CoLoraUpload(NamedTuple):
    """What leaves a client."""

    parts: Parts
    sketch: dict[str, Array]  # by kind: f32[s], of the gradient with respect to P and Q


class CoLoraClient(NamedTuple):
    """The personal state of one client."""

    params: Parts  # its local branch, "gate" by kind T[Li, r + 1], "head"
    heard: Parts  # the shared branch as it was last downloaded
    opt: PyTree  # optimiser state where it is kept between rounds, else ()


@exact
def similarity(
    specs: Specs, sketches: tuple[dict[str, Array], ...], place: int, client: Array
) -> tuple[Array, ...]:  # f32[C] a cohort
    """Cosine of the gradient sketch of one client of one cohort with those of all clients.

    Only kinds that both have are compared; a client that has not been heard is similar to none.
    """
    own = {kind: jnp.take(rows, client, axis=0) for kind, rows in sketches[place].items()}
    result = []
    for spec, theirs in zip(specs, sketches):
        common = [kind for kind in own if kind in theirs]
        zero = jnp.zeros(spec.num_clients, jnp.float32)
        dot = sum((theirs[kind] @ own[kind] for kind in common), zero)
        ours = sum(((own[kind] ** 2).sum() for kind in common), jnp.zeros((), jnp.float32))
        square = sum(((theirs[kind] ** 2).sum(axis=1) for kind in common), zero)
        norms = jnp.sqrt(ours) * jnp.sqrt(square)
        result.append(jnp.where(norms > 0, dot / jnp.where(norms > 0, norms, 1), 0))
    return tuple(result)


@exact
def hear(
    specs: Specs, server: CoLoraServer, place: int, client: Array, temperature: float
) -> Parts:
    """Mix what others have sent for one client of a cohort: weights w_j exp(sim_ij / tau), j != i.

    They are normalised over those who have a part at all: P and Q of a kind over the clients of any
    architecture that have the kind, the other layers' factors over the same architecture. Where nobody
    else was heard: what everyone starts from, which adds nothing.
    """
    latest = server.latest
    similar = similarity(specs, tuple(one.sent.sketch for one in latest), place, client)
    weights = tuple(
        jnp.asarray(one.weights).at[client].set(0) if other == place else one.weights
        for other, one in enumerate(latest)
    )
    shares = aggregate.shares_of_alike(similar, weights, temperature)
    own = aggregate.architecture(specs[place])
    alike = [aggregate.architecture(spec) == own for spec in specs]
    parts: list[Parts] = [one.sent.parts for one in latest]

    def mix(name: str, kind: str) -> Array:
        holders = [
            i
            for i in range(len(specs))
            if kind in parts[i][name] and (name in ("p", "q") or alike[i])
        ]
        leaves = [parts[i][name][kind] for i in holders]
        dtype = at_least_float32(leaves[0].dtype)
        mixed = jnp.zeros(leaves[0].shape[1:], dtype)
        for i, leaf in zip(holders, leaves):
            mixed = mixed + jnp.tensordot(shares[i].astype(dtype), leaf.astype(dtype), axes=1)
        total = sum((shares[i].sum() for i in holders), jnp.zeros((), jnp.float32))
        mixed = (mixed / jnp.where(total > 0, total, 1).astype(dtype)).astype(leaves[0].dtype)
        if name in ("p", "q"):
            return mixed  # zeros
        return jnp.where(total > 0, mixed, server.frozen[own]["start"][name][kind])

    return {name: {kind: mix(name, kind) for kind in parts[place][name]} for name in "pqab"}


def sketch_size(size: int, num_blocks: int, rank: int) -> int:
    """Return s: no more numbers than the gradient itself has."""
    return min(size, num_blocks * rank * (rank + 1))


def sketch(grads: Parts, kinds: tuple[str, ...], size: int) -> dict[str, Array]:  # by kind: f32[s]
    """Project the gradients of P and Q, kind by kind, on signs that are the same for every client.

    Where the gradient has no more than `size` entries it is its own sketch.
    """
    sketches = {}
    for kind in kinds:
        flat = jnp.concatenate(
            [grads[name][kind].astype(jnp.float32).ravel() for name in ("p", "q")]
        )
        if flat.size > size:
            signs = jax.random.rademacher(jax.random.key(flat.size), (flat.size, size), jnp.float32)
            flat = flat @ signs * np.float32(size**-0.5)
        sketches[kind] = flat
    return sketches

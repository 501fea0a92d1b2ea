"""Adaptive federated optimisation (Reddi et al. 2021, arXiv 2003.00295), for any method that averages.

The round's mean is not taken as it is: the server takes an optimiser's step on the negated mean update,

    g = w - mean_i w_i,    w <- w + transformation(g),

with `optax.sgd(1.0)` (which gives the plain mean), `optax.sgd(rate, momentum=0.9)` (FedAvgM),
`optax.adam(rate, eps=1e-3)` (FedAdam), `optax.yogi(rate)` (FedYogi).

What nobody brought in a round (an architecture that was not sampled, a layer that nobody trained, an
entry that nobody selected) has no g, and neither it nor its momentum moves. What was brought is found by
asking the method's own rule: it averages uploads of ones onto a server of zeros.

What is sent in 16 bits is held in float32 here, as are the moments: small steps would be rounded away, and
a second moment would never decay.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax.method import FederatedMethod
from h2tune_jax.training import check_optimizer, narrow, widen
from h2tune_jax.types import FederationError, PyTree

Pieces = dict[str, dict[str, Any]]
"""What is shared, by field of the server's state and, where that is a dict, by its keys (else "")."""


class OptimizedServer(NamedTuple):
    """The method's own server, and the server's optimiser states."""

    inner: PyTree
    opts: Pieces
    wide: Pieces | None = None  # what is shared in float32, where clients are sent 16 bits


def server_optimizer(
    method: FederatedMethod, transformation: optax.GradientTransformation
) -> FederatedMethod:
    """Wrap a method that averages, so that its server moves what is shared by an optimiser.

    `transformation` holds its own learning rate, as optax's optimisers do. It runs for each architecture
    by itself (for each entry of a field that is a dict), and counts the rounds that brought something.

    Other fields of the method's server may follow from the shared part, as it was moved. Methods that keep
    more of the uploads (a residual of their mean) name no shared fields.
    """
    fields = method.shared
    if not fields:
        raise FederationError(
            f"server_optimizer: {method.name!r} averages nothing entry by entry that an optimiser could "
            "move"
        )
    check_optimizer(transformation, has_rate=True)

    def take(server: PyTree) -> Pieces:
        values = {field: getattr(server, field) for field in fields}
        return {f: dict(v) if isinstance(v, dict) else {"": v} for f, v in values.items()}

    def put(server: PyTree, pieces: Pieces) -> PyTree:
        whole = lambda field: not isinstance(getattr(server, field), dict)
        return server._replace(**{f: p[""] if whole(f) else p for f, p in pieces.items()})

    def each(function, first: Pieces, *rest: Pieces) -> Pieces:
        return {
            field: {name: function(*(tree[field][name] for tree in (first, *rest))) for name in own}
            for field, own in first.items()
        }

    def init_server(specs, key, bases, probe) -> OptimizedServer:
        inner = method.init_server(specs, key, bases, probe)
        pieces = take(inner)
        wide = widen(pieces)
        dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
        kept = None if dtypes(wide) == dtypes(pieces) else wide
        return OptimizedServer(inner, each(transformation.init, wide), kept)

    def broadcast(specs, key, server, client_ids, round_index):
        return method.broadcast(specs, key, server.inner, client_ids, round_index)

    def reduce(spec, upload, weight) -> tuple[PyTree, PyTree]:
        assert method.reduce is not None
        return method.reduce(spec, upload, weight), method.reduce(spec, _ones(upload), weight)

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        def aggregate(inner: PyTree, uploads: tuple, weights: tuple, client_ids: tuple):
            rest = bases, probe, uploads, weights, client_ids, round_index
            return method.server_aggregate(specs, key, inner, *rest)

        if method.reduce is None:
            marks = tuple(None if upload is None else _ones(upload) for upload in uploads)
        else:
            marks = tuple(None if upload is None else upload[1] for upload in uploads)
            uploads = tuple(None if upload is None else upload[0] for upload in uploads)
        before = take(server.inner) if server.wide is None else server.wide
        averaged, seen = aggregate(put(server.inner, before), uploads, weights, client_ids)
        zeros = put(server.inner, jax.tree.map(jnp.zeros_like, before))
        brought = take(aggregate(zeros, marks, weights, client_ids)[0])
        steps = each(_step(transformation), before, take(averaged), brought, server.opts)
        moved, opts = (each(lambda step, i=i: step[i], steps) for i in (0, 1))
        # Once more, with nobody: what the method reads off the shared part (Fed-HeLLo's scores) it is to
        # read off the moved one, and off nothing else that the mean gave.
        uploads, weights, client_ids = (
            (none,) * len(specs)
            for none in (None, jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.int32))
        )
        inner, _ = aggregate(put(server.inner, moved), uploads, weights, client_ids)
        after = take(inner)
        inner = put(inner, narrow(after, take(server.inner)))
        return OptimizedServer(inner, opts, None if server.wide is None else after), seen

    return method._replace(
        name=f"{method.name}+server_optimizer",
        init_server=init_server,
        broadcast=broadcast,
        reduce=None if method.reduce is None else reduce,
        server_aggregate=server_aggregate,
        adapters=lambda spec, server, client, download: method.adapters(
            spec, server.inner, client, download
        ),
        shared=(),
    )


def _ones(tree: PyTree) -> PyTree:
    """Replace what is averaged by ones; whole numbers and masks say where, and stay."""
    floats = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda leaf: jnp.ones_like(leaf) if floats(leaf) else leaf, tree)


def _step(transformation: optax.GradientTransformation):
    """Give the step of one piece: (before, mean, brought, opt) -> (moved, opt)."""

    def step(before: PyTree, mean: PyTree, brought: PyTree, opt: PyTree) -> tuple[PyTree, PyTree]:
        against = jax.tree.map(jnp.subtract, before, mean)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, after = transformation.update(against, opt, before)
            moved = optax.apply_updates(before, updates)
        brought = jax.tree.map(lambda mark: mark != 0, brought)
        anything = jnp.stack([mark.any() for mark in jax.tree.leaves(brought)]).any()

        def hold(mark, new, old):
            return jnp.where(mark, new.astype(old.dtype), old)

        def hold_state(new: PyTree, old: PyTree) -> PyTree:
            if _alike(new, before):  # moments, entry by entry
                return jax.tree.map(hold, brought, new, old)
            return jax.tree.map(lambda n, o: hold(anything, n, o), new, old)

        moved = jax.tree.map(hold, brought, moved, before)
        return moved, jax.tree.map(
            hold_state, after, opt, is_leaf=lambda node: _alike(node, before)
        )

    return step


def _alike(one: PyTree, other: PyTree) -> bool:
    """Say whether two trees have one structure and equal shapes."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
    return all(jnp.shape(a) == jnp.shape(b) for a, b in pairs)

"""Adaptive federated optimisation (Reddi et al. 2021, arXiv 2003.00295), for any method that averages.

The round's mean is not taken as it is: the server takes an optimiser's step on the negated mean update,

    g = w - mean_i w_i,    w <- w + transformation(g),

with `optax.sgd(1.0)` (which gives the plain mean), `optax.sgd(rate, momentum=0.9)` (FedAvgM),
`optax.adam(rate, eps=1e-3)` (FedAdam), `optax.yogi(rate)` (FedYogi).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax.method import FederatedMethod
from h2tune_jax.types import FederationError, PyTree


class OptimizedServer(NamedTuple):
    """The method's own server, and the server's optimiser state."""

    inner: PyTree
    opt: PyTree


def server_optimizer(
    method: FederatedMethod, transformation: optax.GradientTransformation
) -> FederatedMethod:
    """Wrap a method that averages, so that its server moves what is shared by an optimiser.

    `transformation` holds its own learning rate, as optax's optimisers do. A round in which nobody
    counts moves nothing.
    """
    fields = method.shared
    if not fields:
        raise FederationError(
            f"server_optimizer: {method.name!r} averages nothing entry by entry that an optimiser could "
            "move"
        )
    shared = lambda server: {field: getattr(server, field) for field in fields}

    def init_server(specs, key, bases, probe) -> OptimizedServer:
        inner = method.init_server(specs, key, bases, probe)
        return OptimizedServer(inner, transformation.init(shared(inner)))

    def broadcast(specs, key, server, client_ids, round_index):
        return method.broadcast(specs, key, server.inner, client_ids, round_index)

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        rest = bases, probe, uploads, weights, client_ids, round_index
        averaged, seen = method.server_aggregate(specs, key, server.inner, *rest)
        before, mean = shared(server.inner), shared(averaged)
        against = jax.tree.map(jnp.subtract, before, mean)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, opt = transformation.update(against, server.opt, before)
            moved = optax.apply_updates(before, updates)
        anyone = jnp.stack([(weight > 0).any() for weight in weights]).any()
        hold = lambda new, old: jnp.where(anyone, new.astype(old.dtype), old)
        moved = jax.tree.map(hold, moved, before)
        opt = jax.tree.map(hold, opt, server.opt)
        return OptimizedServer(averaged._replace(**moved), opt), seen

    return method._replace(
        name=f"{method.name}+server_optimizer",
        init_server=init_server,
        broadcast=broadcast,
        server_aggregate=server_aggregate,
        adapters=lambda spec, server, client, download: method.adapters(
            spec, server.inner, client, download
        ),
        shared=(),
    )

"""All data of a cohort in one place: the ceiling of what federation could give.

Not a federated method: what clients send is their data. The server trains one LoRA and one head a
cohort on what was sent in the round, and everyone uses that model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax import aggregate
from h2tune_jax.check import check_choice
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.lora import (
    LoraHyper,
    Parts,
    Training,
    assemble,
    train,
)
from h2tune_jax.methods.start import init_params
from h2tune_jax.methods.traffic import Units, traffic
from h2tune_jax.training import Schedule, all_finite, room, run_steps, scalar_metrics
from h2tune_jax.types import Budget, ClientData, Download, PyTree, fold_name


class CentralServer(NamedTuple):
    """One model a cohort, by its name."""

    params: dict[str, Parts]
    opts: dict[str, PyTree]  # optimiser states where they are kept between rounds, else ()


class CentralUpload(NamedTuple):
    """A client's data, and the settings that the server trains it with."""

    data: ClientData
    hyper: LoraHyper


def centralised(
    *,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
    budget: str = "all",
) -> FederatedMethod:
    """Build the ceiling: a plain LoRA a cohort, trained by the server on all of its clients' data.

    The other options are those of `local`. Weights do not matter but for zero, which leaves a client's
    data out. A client's `loss` is that of the model that it downloads, on its own batches.

    Args:
      budget: with a `Budget` of steps, "all" trains as many as the round's clients would together (those
        that count), "one" as many as one of them. A budget of epochs means as many over all the data.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    check_choice("budget", budget, ("all", "one"))

    def init_server(specs, key, bases, probe) -> CentralServer:
        del bases, probe
        params = {spec.name: init_params(spec, fold_name(key, spec.name)) for spec in specs}
        opts = {name: training.start(parts) for name, parts in params.items()}
        return CentralServer(params, opts)

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, client_ids, round_index
        return tuple(Download(server.params[spec.name], ()) for spec in specs)

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index, drift_fn  # the client trains nothing
        adapters = assemble(spec, download.common)

        def look(carry, batch, key, step, num_steps):
            del key, step, num_steps
            loss, metrics = spec.loss_fn(adapters, base, batch, None)
            return carry, {**scalar_metrics(f"cohort {spec.name!r}", metrics), "loss": loss}

        once = Budget(batch_size=spec.budget.batch_size, epochs=1, shuffle=False)
        _, metrics = run_steps(once, key, data, (), look)
        example = jax.tree.map(lambda leaf: leaf[0], data.examples)
        sent = Units(data.num_examples, example, room(data))
        counts = {"steps": jnp.zeros((), jnp.int32), **traffic(up=sent, down=download.common)}
        return client, CentralUpload(data, hyper), {**metrics, **counts}

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del probe, round_index
        params, opts, losses = dict(server.params), dict(server.opts), {}
        for spec, base, upload, weight, ids in zip(specs, bases, uploads, weights, client_ids):
            if upload is None:
                continue
            name, order = spec.name, aggregate.in_order(weight, ids)
            data, hyper = jax.tree.map(lambda leaf, order=order: leaf[order], upload)
            before = server.params[name], server.opts[name]
            *after, metrics = train(
                training,
                spec,
                fold_name(key, name),
                base,
                pool(data),
                jax.tree.map(lambda leaf: leaf[0], hyper),
                *before,
                adapters_fn=lambda parts, spec=spec: assemble(spec, parts),
                times=(weight > 0).sum(dtype=jnp.int32) if budget == "all" else None,
            )
            # As the round does for a client that trains: what is not finite changes nothing.
            fine = all_finite((metrics["loss"], after))
            params[name], opts[name] = jax.tree.map(
                lambda new, old, fine=fine: jnp.where(fine, new, old), tuple(after), before
            )
            losses[name] = metrics["loss"]
        return CentralServer(params, opts), {"loss": losses}

    return FederatedMethod(
        name="centralised",
        hyper=training.hyper(),
        init_server=init_server,
        init_client=lambda spec, key, base, download: (),
        broadcast=broadcast,
        client_update=client_update,
        reduce=None,
        server_aggregate=server_aggregate,
        adapters=lambda spec, server, client, download: assemble(spec, server.params[spec.name]),
        check=lambda specs: None,
    )


def pool(data: ClientData) -> ClientData:
    """Put clients' examples [S, n, ...] into one place [S n, ...], padding last."""
    clients, rows = jax.tree.leaves(data.examples)[0].shape[:2]
    held = jnp.arange(rows, dtype=jnp.int32)[None, :] < data.num_examples[:, None]
    order = jnp.argsort(~held.reshape(-1), stable=True)
    gather = lambda leaf: leaf.reshape(clients * rows, *leaf.shape[2:])[order]
    return ClientData(jax.tree.map(gather, data.examples), data.num_examples.sum(dtype=jnp.int32))

"""FedAvg (McMahan et al. 2017, arXiv 1602.05629) of whole models.

What a cohort trains and shares is its `head`: all the parameters that `init_head_fn` makes. A model
without a frozen base puts everything there, and has no adapted sites.
A client keeps nothing between rounds, so it is evaluated on the server's model at either moment.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax import aggregate
from h2tune_jax.check import check_positive
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.traffic import traffic
from h2tune_jax.training import (
    check_optimizer,
    descend,
    narrow,
    run_steps,
    scalar_metrics,
    widen,
)
from h2tune_jax.types import Adapters, Array, Download, FederationError, PyTree, Specs, fold_name


class FedAvgServer(NamedTuple):
    """The server's models."""

    models: dict[str, PyTree]  # by cohort


class FedAvgHyper(NamedTuple):
    """Traced settings."""

    learning_rate: Array


def fedavg(
    *, learning_rate: float = 0.1, optimizer: optax.GradientTransformation | None = None
) -> FederatedMethod:
    """Build FedAvg: every cohort's clients start from its model, and the server takes their mean.

    Args:
      learning_rate: of the clients.
      optimizer: a transformation without a learning rate, restarted every round; None means SGD.
    """
    check_positive("learning_rate", learning_rate)
    optimizer = optax.identity() if optimizer is None else optimizer
    check_optimizer(optimizer)

    def check(specs: Specs) -> None:
        for spec in specs:
            if spec.init_head_fn is None:
                raise FederationError(f"cohort {spec.name!r}: init_head_fn is missing")
            if spec.head_rate_factor != 1:
                raise FederationError(
                    f"cohort {spec.name!r}: fedavg trains whole models at one rate, so head_rate_factor "
                    f"must be 1, got {spec.head_rate_factor}"
                )
            if spec.kinds:
                raise FederationError(
                    f"cohort {spec.name!r}: fedavg trains whole models and no adapters; set targets=()"
                )

    def init_server(specs, key, bases, probe) -> FedAvgServer:
        del bases, probe
        start = lambda spec: spec.init_head_fn(fold_name(key, spec.name))
        return FedAvgServer({spec.name: start(spec) for spec in specs})

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, client_ids, round_index
        return tuple(Download(server.models[spec.name], ()) for spec in specs)

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        sent = download.common
        start = widen(sent)  # where local training begins: at least float32
        drift = (lambda params: 0.0) if drift_fn is None else lambda params: drift_fn(params, start)

        def step_fn(carry, batch, key, step, num_steps):
            del step, num_steps
            params, opt = carry

            def objective(params):
                loss, metrics = spec.loss_fn(Adapters({}, narrow(params, sent)), base, batch, key)
                return loss + jnp.asarray(drift(params), loss.dtype), (loss, metrics)

            grads, (loss, metrics) = jax.grad(objective, has_aux=True)(params)
            params, opt = descend(optimizer, grads, opt, params, hyper.learning_rate)
            where = f"cohort {spec.name!r}"
            return (params, opt), {**scalar_metrics(where, metrics), "loss": loss}

        carry = start, optimizer.init(start)
        (params, _), metrics = run_steps(spec.budget, key, data, carry, step_fn)
        trained = narrow(params, sent)
        return client, trained, {**metrics, **traffic(up=trained, down=sent)}

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, bases, probe, weights, client_ids, round_index

        means = dict(server.models)
        for spec, part in zip(specs, uploads):
            if part is not None:
                total, share = part
                means[spec.name] = aggregate.mean_or_keep(total, share, means[spec.name])
        return FedAvgServer(means), {}

    return FederatedMethod(
        name="fedavg",
        hyper=FedAvgHyper(jnp.asarray(learning_rate, jnp.result_type(float))),
        init_server=init_server,
        init_client=lambda spec, key, base, download: (),
        broadcast=broadcast,
        client_update=client_update,
        reduce=lambda spec, upload, weight: aggregate.weighted_part(upload, weight),
        server_aggregate=server_aggregate,
        adapters=lambda spec, server, client, download: Adapters({}, server.models[spec.name]),
        check=check,
        shared=("models",),
    )

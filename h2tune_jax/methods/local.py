"""Every client alone with a plain LoRA: the floor that a federation must beat."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax.adapters import triple
from h2tune_jax.adapters.site import SiteAdapter
from h2tune_jax.check import check_choice, check_not_negative, check_positive
from h2tune_jax.method import FederatedMethod
from h2tune_jax.training import Schedule, descend, pace, run_steps, scalar_metrics
from h2tune_jax.types import Adapters, Array, CohortSpec, Download, PyTree, fold_name


class LoraHyper(NamedTuple):
    """Traced settings of a plain LoRA's training, all scalars."""

    learning_rate: Array  # of A, B
    head_rate: Array
    weight_decay: Array


class LoraClient(NamedTuple):
    """A client's LoRA and head."""

    params: dict[str, Any]  # "a", "b": by kind T[Li, D, r], T[Li, r, F]; "head"
    opt: PyTree  # optimiser state where it is kept between rounds, else ()


def local(
    *,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build the method that shares nothing.

    Args:
      learning_rate: of A and B.
      head_rate: of the task head; None means `learning_rate`.
      weight_decay: decoupled, on all that is trained.
      optimizer: a transformation without a learning rate; None means `optax.scale_by_adam()`.
      optimizer_state: "restart" every round, or "kept".
      schedule: (step, num_steps) -> multiplier of the rates within a round.
    """
    head_rate = learning_rate if head_rate is None else head_rate
    check_positive("learning_rate", learning_rate)
    check_positive("head_rate", head_rate)
    check_not_negative("weight_decay", weight_decay)
    check_choice("optimizer_state", optimizer_state, ("restart", "kept"))
    optimizer = optax.scale_by_adam() if optimizer is None else optimizer
    kept = optimizer_state == "kept"

    def init_client(spec: CohortSpec, key: Array, base: PyTree, download: Download) -> LoraClient:
        del base, download
        factor_key, head_key = jax.random.split(key)
        params: dict[str, Any] = {"a": {}, "b": {}}
        for kind in spec.kinds:
            params["a"][kind], params["b"][kind] = triple.init(
                fold_name(factor_key, kind),
                spec.model.num_layers,
                *spec.model.shapes[kind],
                spec.rank,
                dtype=spec.dtype,
            )
        params["head"] = None if spec.init_head_fn is None else spec.init_head_fn(head_key)
        return LoraClient(params, optimizer.init(params) if kept else ())

    def assemble(spec: CohortSpec, params: dict[str, Any]) -> Adapters:
        sites = {
            kind: SiteAdapter(
                a=params["a"][kind],
                core=None,
                b=params["b"][kind],
                scale=spec.scale,
                dropout=spec.dropout,
                kernels=spec.kernels,
            )
            for kind in spec.kinds
        }
        return Adapters(sites, params["head"])

    def client_update(spec, key, base, client, download, data, hyper, round_index):
        del download, round_index

        def step_fn(carry, batch, key, step, num_steps):
            params, opt = carry

            def objective(params):
                return spec.loss_fn(assemble(spec, params), base, batch, key)

            (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
            now = schedule, step, num_steps
            rates = dict.fromkeys(params, pace(hyper.learning_rate, *now))
            rates["head"] = pace(spec.head_rate_factor * hyper.head_rate, *now)
            decay = dict.fromkeys(params, hyper.weight_decay)
            params, opt = descend(optimizer, grads, opt, params, rates, decay=decay)
            where = f"cohort {spec.name!r}"
            return (params, opt), {**scalar_metrics(where, metrics), "loss": loss}

        carry = client.params, client.opt if kept else optimizer.init(client.params)
        (params, opt), metrics = run_steps(spec.budget, key, data, carry, step_fn)
        none = jnp.zeros((), jnp.int32)
        traffic = {"numbers_up": none, "numbers_down": none}
        return LoraClient(params, opt if kept else ()), (), {**metrics, **traffic}

    return FederatedMethod(
        name="local",
        hyper=LoraHyper(
            *(
                jnp.asarray(value, jnp.result_type(float))
                for value in (learning_rate, head_rate, weight_decay)
            )
        ),
        init_server=lambda specs, key, bases, probe: (),
        init_client=init_client,
        broadcast=lambda specs, key, server, client_ids, round_index: (
            (Download((), ()),) * len(specs)
        ),
        client_update=client_update,
        reduce=lambda spec, upload, weight: (),
        server_aggregate=lambda specs, key, server, *rest: (server, {}),
        adapters=lambda spec, server, client, download: assemble(spec, client.params),
        check=lambda specs: None,
    )

"""Every client alone with a plain LoRA: the floor that a federation must beat."""

import optax

from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.lora import (
    LoraClient,
    Training,
    assemble,
    train,
)
from h2tune_jax.methods.start import init_params
from h2tune_jax.methods.traffic import traffic
from h2tune_jax.training import Schedule
from h2tune_jax.types import Download


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
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )

    def init_client(spec, key, base, download) -> LoraClient:
        del base, download
        params = init_params(spec, key)
        return LoraClient(params, training.start(params))

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del download, round_index, drift_fn  # nothing was downloaded that could drift
        params, opt, metrics = train(
            training, spec, key, base, data, hyper, client.params, client.opt,
            adapters_fn=lambda params: assemble(spec, params),
        )  # fmt: skip
        return LoraClient(params, opt), (), {**metrics, **traffic(up=(), down=())}

    return FederatedMethod(
        name="local",
        hyper=training.hyper(),
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

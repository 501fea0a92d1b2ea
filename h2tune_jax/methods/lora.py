"""What every plain-LoRA method shares: a client's parts, its adapters, and its local training.

A client's parts are a dict: "a" and "b" by kind, "head", and whatever else a method trains beside
them. `train` moves the parts that it is given and leaves the rest to `adapters_fn`, so frozen factors cost
no gradient, and layers that a client does not train no optimiser state.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax import aggregate
from h2tune_jax.adapters.beside import Beside
from h2tune_jax.adapters.site import SiteAdapter
from h2tune_jax.check import check_choice, check_not_negative, check_positive
from h2tune_jax.method import DriftFn, FederatedMethod
from h2tune_jax.methods.start import Parts, init_factors, init_params
from h2tune_jax.methods.traffic import traffic
from h2tune_jax.training import (
    Schedule,
    check_optimizer,
    descend,
    narrow,
    pace,
    run_steps,
    scalar_metrics,
    widen,
)
from h2tune_jax.types import (
    Adapters,
    Array,
    ClientData,
    CohortSpec,
    Download,
    FederationError,
    Metrics,
    PyTree,
    Specs,
    fold_name,
)


class LoraHyper(NamedTuple):
    """Traced settings of a plain LoRA's training, all scalars."""

    learning_rate: Array  # of all parts but the head
    head_rate: Array
    weight_decay: Array


class LoraClient(NamedTuple):
    """A client's parts as local training left them."""

    params: Parts
    opt: PyTree  # optimiser state where it is kept between rounds, else ()


@dataclasses.dataclass(frozen=True)
class Training:
    """How a client trains: the options that all plain-LoRA methods have.

    Attributes:
      learning_rate: of A, B and whatever else is trained beside the head.
      head_rate: of the task head; None means `learning_rate`.
      weight_decay: decoupled, on all that is trained.
      optimizer: a transformation without a learning rate; None means `optax.scale_by_adam()`.
      optimizer_state: "restart" every round, or "kept".
      schedule: (step, num_steps) -> multiplier of the rates within a round.
    """

    learning_rate: float = 1e-3
    head_rate: float | None = None
    weight_decay: float = 0.0
    optimizer: optax.GradientTransformation | None = None
    optimizer_state: str = "restart"
    schedule: Schedule | None = None

    def __post_init__(self):
        check_positive("learning_rate", self.learning_rate)
        check_positive("head_rate", self.head_rate)
        check_not_negative("weight_decay", self.weight_decay)
        check_choice("optimizer_state", self.optimizer_state, ("restart", "kept"))
        if self.optimizer is None:
            object.__setattr__(self, "optimizer", optax.scale_by_adam())
        else:
            check_optimizer(self.optimizer)

    @property
    def transform(self) -> optax.GradientTransformation:
        """The optimiser."""
        assert self.optimizer is not None  # set in __post_init__
        return self.optimizer

    @property
    def kept(self) -> bool:
        """Optimiser state lives on between rounds."""
        return self.optimizer_state == "kept"

    def hyper(self) -> LoraHyper:
        """Return the traced settings' defaults as arrays."""
        head_rate = self.learning_rate if self.head_rate is None else self.head_rate
        values = self.learning_rate, head_rate, self.weight_decay
        return LoraHyper(*(jnp.asarray(value, jnp.result_type(float)) for value in values))

    def start(self, parts: Parts) -> PyTree:
        """Return what a client's state keeps of the optimiser at its start."""
        return self.transform.init(widen(parts)) if self.kept else ()


def assemble(
    spec: CohortSpec,
    parts: Parts,
    *,
    core: dict[str, Array] | None = None,  # by kind: T[Li, r, r]; dW = scale * A (I + core) B
    beside: dict[str, Beside] | None = None,  # by kind: what a server has folded in
) -> Adapters:
    """Put a client's parts together as a loss function sees them."""
    sites = {
        kind: SiteAdapter(
            a=parts["a"][kind],
            core=None if core is None else core[kind],
            b=parts["b"][kind],
            beside=None if beside is None else beside[kind],
            scale=spec.scale,
            dropout=spec.dropout,
            kernels=spec.kernels,
        )
        for kind in spec.kinds
    }
    return Adapters(sites, parts["head"])


def train(
    training: Training,
    spec: CohortSpec,
    key: Array,
    base: PyTree,
    data: ClientData,
    hyper: Any,
    params: Parts,
    opt: PyTree,
    *,
    adapters_fn: Callable[[Parts], Adapters],
    penalty_fn: Callable[[Parts], Array] | None = None,
    keep: PyTree = None,
    times: Array | None = None,
) -> tuple[Parts, PyTree, dict[str, Array]]:
    """Run one client's local steps of a round: -> (trained parts, optimiser state to keep, metrics).

    Parts of 16 bits are trained in float32 (`widen`): the adapters are put together from parts in their own
    dtypes, penalty, gradients and optimiser see the wide ones, and what is returned is narrow again.

    Args:
      training: the method's options.
      spec: the client's cohort.
      key: for the order of the examples and for dropout.
      base: the frozen model.
      data: the client's examples.
      hyper: the traced settings, a `LoraHyper` or what has its fields.
      params: the parts that are trained, as they stand at the start.
      opt: the kept optimiser state; not looked at where it restarts.
      adapters_fn: trained parts -> adapters; closes over what is frozen.
      penalty_fn: trained parts, wide -> a scalar that is added to the loss.
      keep: as in `descend`: masks outside of which nothing moves.
      times: as in `run_steps`: multiplies a budget of steps.
    """
    head_rate = spec.head_rate_factor * hyper.head_rate

    def step_fn(carry, batch, key, step, num_steps):
        wide, opt = carry

        def objective(wide: Parts) -> tuple[Array, tuple[Array, Metrics]]:
            loss, metrics = spec.loss_fn(adapters_fn(narrow(wide, params)), base, batch, key)
            total = loss if penalty_fn is None else loss + penalty_fn(wide).astype(loss.dtype)
            return total, (loss, metrics)

        grads, (loss, metrics) = jax.grad(objective, has_aux=True)(wide)
        rates = {
            name: pace(
                head_rate if name == "head" else hyper.learning_rate,
                training.schedule,
                step,
                num_steps,
            )
            for name in params
        }
        decay = dict.fromkeys(params, hyper.weight_decay)
        wide, opt = descend(training.transform, grads, opt, wide, rates, decay=decay, keep=keep)
        seen = scalar_metrics(f"cohort {spec.name!r}", metrics)
        return (wide, opt), {**seen, "loss": loss}

    wide = widen(params)
    carry = wide, opt if training.kept else training.transform.init(wide)
    (wide, opt), metrics = run_steps(spec.budget, key, data, carry, step_fn, times=times)
    return narrow(wide, params), opt if training.kept else (), metrics


def drift_penalty(
    drift_fn: DriftFn | None, start: Parts
) -> Callable[[Parts], Array] | None:  # trained parts -> []
    """Give the penalty on the parts named in `start`: their drift from where they were downloaded."""
    if drift_fn is None:
        return None
    wide = widen(start)
    return lambda params: drift_fn({name: params[name] for name in start}, wide)


class LoraServer(NamedTuple):
    """What a server of averaged LoRA parts holds, by architecture."""

    start: dict[str, Parts]  # drawn once, frozen, sent at first contact
    factors: dict[str, Parts]  # the shared parts


class LoraDownload(NamedTuple):
    """What a cohort is sent; its frozen parts stand beside it."""

    start: Parts
    factors: Parts


def averaging(
    name: str, training: Training, *, shares: tuple[str, ...], freezes: tuple[str, ...] = ()
) -> FederatedMethod:
    """Build a method that averages some of the factors "a" and "b", once an architecture.

    Clients start every round from the mean of what is shared. What is frozen stays where the server
    drew it; the rest, and the head, is personal.
    """

    def check(specs: Specs) -> None:
        check_adapted(name, specs)
        aggregate.check_alike(name, specs, ("targets", "rank", "alpha", "dtype"))

    def init_server(specs, key, bases, probe) -> LoraServer:
        del bases, probe
        drawn = {
            architecture: init_factors(specs[group[0]], fold_name(key, architecture))
            for architecture, group in aggregate.architectures(specs).items()
        }
        pick = lambda parts: {own: _only(factors, parts) for own, factors in drawn.items()}
        return LoraServer(pick(freezes), pick(shares))

    def init_client(spec, key, base, download) -> LoraClient:
        del base, download
        params = init_params(spec, key)
        params = {part: params[part] for part in params if part not in freezes}
        return LoraClient(params, training.start(params))

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, client_ids, round_index
        own = (aggregate.architecture(spec) for spec in specs)
        return tuple(Download(LoraDownload(server.start[i], server.factors[i]), ()) for i in own)

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        start, factors = download.common
        params, opt, metrics = train(
            training, spec, key, base, data, hyper, {**client.params, **factors}, client.opt,
            adapters_fn=lambda params: assemble(spec, {**start, **params}),
            penalty_fn=drift_penalty(drift_fn, factors),
        )  # fmt: skip
        sent = _only(params, shares)
        return LoraClient(params, opt), sent, {**metrics, **traffic(up=sent, down=factors)}

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, bases, probe, weights, client_ids, round_index
        factors = aggregate.mean_by_architecture(specs, uploads, server.factors)
        return server._replace(factors=factors), {}

    def adapters(spec, server, client, download) -> Adapters:
        received = {} if download is None else download.common.factors
        frozen = server.start[aggregate.architecture(spec)]
        return assemble(spec, {**frozen, **client.params, **received})

    return FederatedMethod(
        name=name,
        hyper=training.hyper(),
        init_server=init_server,
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        reduce=lambda spec, upload, weight: aggregate.weighted_part(upload, weight),
        server_aggregate=server_aggregate,
        adapters=adapters,
        check=check,
        shared=("factors",),
    )


def check_adapted(method: str, specs: Specs) -> None:
    """Refuse cohorts that have no adapters to share."""
    for spec in specs:
        if not spec.kinds:
            raise FederationError(
                f"cohort {spec.name!r}: targets is empty; {method} shares the factors of adapted sites"
            )


def _only(parts: Parts, names: tuple[str, ...]) -> Parts:
    return {name: parts[name] for name in names}

"""FedEx-LoRA (Singhal et al., ACL 2025, arXiv 2410.09432): averages, and exactly what they lose.

    A = sum_i s_i A_i,    B = sum_i s_i B_i,
    residual = scale (sum_i s_i A_i B_i - A B) = scale sum_i s_i (A_i - A)(B_i - B),

which is folded into the base. Base and adapter together are then the exact mean of the clients' dW (to
the rounding of A and B: the second form of the residual takes them for exact, so 16-bit adapters lose it).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax import aggregate
from h2tune_jax.check import check_whole
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.ledger import (
    Ledger,
    LedgerClient,
    LedgerDownload,
    add_round,
    as_had,
    check_room,
    fetched,
    open_ledgers,
    send,
)
from h2tune_jax.methods.lora import (
    Parts,
    Training,
    assemble,
    check_adapted,
    drift_penalty,
    train,
)
from h2tune_jax.methods.start import init_factors, init_params
from h2tune_jax.methods.traffic import traffic
from h2tune_jax.training import Schedule
from h2tune_jax.types import Adapters, Download, fold_name


class FedExServer(NamedTuple):
    """The means, and what stands beside the base, by architecture."""

    factors: dict[str, Parts]
    ledgers: dict[str, Ledger]


class FedExDownload(NamedTuple):
    """What a cohort is sent."""

    factors: Parts
    beside: LedgerDownload


def fedex_lora(
    *,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
    capacity: int | None = None,
) -> FederatedMethod:
    """Build FedEx-LoRA.

    The other options are those of `local`. Heads are personal. Cohorts of one architecture need equal
    ranks. `capacity`, and what clients that skipped rounds are evaluated as, is as in `flora`.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    check_whole("capacity", capacity)

    def check(specs) -> None:
        check_adapted("fedex_lora", specs)
        check_room("fedex_lora", specs, capacity)
        aggregate.check_alike("fedex_lora", specs, ("targets", "rank", "alpha", "dtype"))

    def init_server(specs, key, bases, probe) -> FedExServer:
        del bases, probe
        factors = {
            name: init_factors(specs[group[0]], fold_name(key, name))
            for name, group in aggregate.architectures(specs).items()
        }
        return FedExServer(factors, open_ledgers(specs, capacity))

    def init_client(spec, key, base, download) -> LedgerClient:
        del base, download
        params = init_params(spec, key)
        return LedgerClient(params, training.start(params), jnp.zeros((), jnp.int32))

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, client_ids, round_index
        sent = {
            name: FedExDownload(server.factors[name], send(ledger))
            for name, ledger in server.ledgers.items()
        }
        return tuple(Download(sent[aggregate.architecture(spec)], ()) for spec in specs)

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        factors, beside = download.common
        params, opt, metrics = train(
            training, spec, key, base, data, hyper, {**client.params, **factors}, client.opt,
            adapters_fn=lambda params: assemble(spec, params, beside=beside.sites),
            penalty_fn=drift_penalty(drift_fn, factors),
        )  # fmt: skip
        sent = {"a": params["a"], "b": params["b"]}
        numbers = traffic(up=sent, down=(factors, fetched(beside, client.had)))
        return LedgerClient(params, opt, beside.total), sent, {**metrics, **numbers}

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, bases, probe, round_index
        parts = tuple(
            None if upload is None else aggregate.sum_parts(upload, weight)
            for upload, weight in zip(uploads, weights)
        )
        factors = aggregate.mean_by_architecture(specs, parts, server.factors)
        ledgers = add_round(server.ledgers, specs, uploads, weights, client_ids, centres=factors)
        return FedExServer(factors, ledgers), {}

    def adapters(spec, server, client, download) -> Adapters:
        if download is not None:
            factors, beside = download.common
            return assemble(spec, {**client.params, **factors}, beside=beside.sites)
        name = aggregate.architecture(spec)
        beside, gone = as_had(server.ledgers[name], client.had)
        factors = server.factors[name]
        own: Parts = {part: client.params[part] for part in factors}
        held = jax.tree.map(lambda new, old: jnp.where(gone, new, old), factors, own)
        return assemble(spec, {**client.params, **held}, beside=beside)

    return FederatedMethod(
        name="fedex_lora",
        hyper=training.hyper(),
        init_server=init_server,
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        reduce=None,
        server_aggregate=server_aggregate,
        adapters=adapters,
        check=check,
        shared=(),  # the residual is that of the means: factors moved otherwise would not go with it
    )

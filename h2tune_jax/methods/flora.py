"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stacked adapters, folded into the base.

    A = [s_1 scale_1 A_1, s_2 scale_2 A_2, ...],   B = [B_1; B_2; ...],   A B = sum_i s_i scale_i A_i B_i.

The stack is the mean of the products, exactly, whatever the ranks. Everyone folds it into the base, and
every client's own adapter restarts from a fresh draw.
"""

from typing import NamedTuple

import jax
import optax

from h2tune_jax import aggregate
from h2tune_jax.check import check_whole
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.ledger import Ledger, append, as_sent, news, open_ledgers
from h2tune_jax.methods.lora import (
    LoraClient,
    Training,
    assemble,
    check_adapted,
    drift_penalty,
    init_factors,
    init_params,
    size,
    train,
)
from h2tune_jax.training import Schedule
from h2tune_jax.types import Adapters, Download, FederationError


class FloraServer(NamedTuple):
    """What stands beside the base, by architecture."""

    ledgers: dict[str, Ledger]


def flora(
    *,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
    capacity: int | None = None,
) -> FederatedMethod:
    """Build FLoRA.

    The other options are those of `local`; kept optimiser states are refused, as adapters restart.

    Args:
      capacity: columns that stand beside the base before they are merged into a dense delta; at least
        the sum of a round's ranks. None: as many as all clients bring in a round, within one to four
        times what the dense delta costs.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    check_whole("capacity", capacity)
    if training.kept:
        raise FederationError("flora: adapters restart every round; use optimizer_state 'restart'")

    def check(specs) -> None:
        check_adapted("flora", specs)
        aggregate.check_alike("flora", specs, ("targets", "dtype"))

    def init_server(specs, key, bases, probe) -> FloraServer:
        del key, bases, probe
        return FloraServer(open_ledgers(specs, capacity))

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, client_ids, round_index
        return tuple(Download(server.ledgers[aggregate.architecture(spec)], ()) for spec in specs)

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        ledger: Ledger = download.common
        draw_key, train_key = jax.random.split(key)
        fresh = init_factors(spec, draw_key)
        params, _, metrics = train(
            training, spec, train_key, base, data, hyper, {**client.params, **fresh}, (),
            adapters_fn=lambda params: assemble(spec, params, beside=ledger.sites),
            penalty_fn=drift_penalty(drift_fn, fresh),
        )  # fmt: skip
        sent = {"a": params["a"], "b": params["b"]}
        numbers = {"numbers_up": size(sent), "numbers_down": news(ledger)}
        return LoraClient(params, ()), sent, {**metrics, **numbers}

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, bases, probe, round_index
        ledgers = dict(server.ledgers)
        for name, group in aggregate.architectures(specs).items():
            stacked = aggregate.stack_products(specs, group, uploads, weights, client_ids)
            if stacked is not None:
                ledgers[name] = append(ledgers[name], *stacked)
        return FloraServer(ledgers), {}

    def adapters(spec, server, client, download) -> Adapters:
        if download is None:
            ledger = server.ledgers[aggregate.architecture(spec)]
            return assemble(spec, client.params, beside=as_sent(ledger))
        # Right after download the client's own adapter has restarted: its product is zero.
        none = jax.tree.map(lambda b: 0 * b, client.params["b"])
        return assemble(spec, {**client.params, "b": none}, beside=download.common.sites)

    return FederatedMethod(
        name="flora",
        hyper=training.hyper(),
        init_server=init_server,
        init_client=lambda spec, key, base, download: LoraClient(init_params(spec, key), ()),
        broadcast=broadcast,
        client_update=client_update,
        reduce=None,
        server_aggregate=server_aggregate,
        adapters=adapters,
        check=check,
        shared=(),
    )

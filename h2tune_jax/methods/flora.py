"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): stacked adapters, folded into the base.

    A = [s_1 scale_1 A_1, s_2 scale_2 A_2, ...],   B = [B_1; B_2; ...],   A B = sum_i s_i scale_i A_i B_i.

The stack is the mean of the products, exactly, whatever the ranks. Everyone folds it into the base, and
every client's own adapter restarts from a fresh draw.
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
from h2tune_jax.types import Adapters, Array, Download, FederationError, fold_name


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
    `proximal` pulls an adapter to the fresh draw that it restarts from in the round.

    A client is evaluated as it was trained as long as the delta that it trained beside can be told: that
    of the last round's clients, and of those before as far as the server's room goes. Another's copy is
    gone, and it is evaluated as it would be right after a download.

    Args:
      capacity: columns that stand apart before they are merged into a dense delta; at least the sum of a
        round's ranks. None: as many as all clients bring in a round, or the smaller width of a site
        where that is less; then every round fits. It costs memory, and no time in training.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    check_whole("capacity", capacity)
    if training.kept:
        raise FederationError("flora: adapters restart every round; use optimizer_state 'restart'")

    def check(specs) -> None:
        check_adapted("flora", specs)
        check_room("flora", specs, capacity)
        aggregate.check_alike("flora", specs, ("targets", "dtype"))

    def init_server(specs, key, bases, probe) -> FloraServer:
        del key, bases, probe
        return FloraServer(open_ledgers(specs, capacity))

    def init_client(spec, key, base, download) -> LedgerClient:
        del base, download
        return LedgerClient(init_params(spec, key), (), jnp.zeros((), jnp.int32))

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, client_ids, round_index
        sent = {name: send(ledger) for name, ledger in server.ledgers.items()}
        return tuple(Download(sent[aggregate.architecture(spec)], ()) for spec in specs)

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        beside: LedgerDownload = download.common
        fresh = init_factors(spec, fold_name(key, "fresh"))
        params, _, metrics = train(
            training, spec, key, base, data, hyper, {**client.params, **fresh}, (),
            adapters_fn=lambda params: assemble(spec, params, beside=beside.sites),
            penalty_fn=drift_penalty(drift_fn, fresh),
        )  # fmt: skip
        sent = {"a": params["a"], "b": params["b"]}
        numbers = traffic(up=sent, down=fetched(beside, client.had))
        return LedgerClient(params, (), beside.total), sent, {**metrics, **numbers}

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, bases, probe, round_index
        return FloraServer(add_round(server.ledgers, specs, uploads, weights, client_ids)), {}

    def restarted(params: Parts, when: Array | bool) -> Parts:
        """Right after a download the client's own adapter has restarted: its product is zero."""
        return {**params, "b": jax.tree.map(lambda b: jnp.where(when, 0, b), params["b"])}

    def adapters(spec, server, client, download) -> Adapters:
        if download is not None:
            return assemble(spec, restarted(client.params, True), beside=download.common.sites)
        ledger = server.ledgers[aggregate.architecture(spec)]
        beside, gone = as_had(ledger, client.had)
        return assemble(spec, restarted(client.params, gone), beside=beside)

    return FederatedMethod(
        name="flora",
        hyper=training.hyper(),
        init_server=init_server,
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        reduce=None,
        server_aggregate=server_aggregate,
        adapters=adapters,
        check=check,
        shared=(),
    )

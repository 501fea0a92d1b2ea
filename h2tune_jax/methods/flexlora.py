"""FlexLoRA (Bai et al., NeurIPS 2024, arXiv 2402.11505): average the products, split them by SVD.

    dW = sum_i s_i scale_i A_i B_i = U diag(s) V,
    client i gets (U sqrt(s))[:, :r_i] and (sqrt(s) V)[:r_i], divided by its own scale.

dW is never formed: QR of the stacked factors, SVD of the small core between them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax import aggregate
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.lora import (
    LoraDownload,
    Parts,
    Training,
    assemble,
    averaging,
    check_adapted,
)
from h2tune_jax.methods.start import init_factors
from h2tune_jax.training import Schedule
from h2tune_jax.types import (
    Adapters,
    Array,
    CohortSpec,
    Download,
    FederationError,
    Specs,
    fold_name,
)


class FlexServer(NamedTuple):
    """dW of each architecture as factors of the largest rank, by kind."""

    start: dict[str, dict]  # T[Li, D, R], columns of A for directions that dW does not have
    factors: dict[str, Parts]  # "a": T[Li, D, R], "b": T[Li, R, F]; their product is dW


def flexlora(
    *,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build FlexLoRA: every client starts from the best approximation of the mean dW at its own rank.

    The options are those of `local`; kept optimiser states are refused, as every round's factors are
    split anew: a column's moments would meet another direction. Heads are personal. Where dW has fewer
    directions than a client has columns, the others start as a fresh LoRA's: a drawn column of A, a zero
    row of B. (Zeros in both, as the SVD gives them, would never train again.)
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    if training.kept:
        raise FederationError(
            "flexlora: factors are split anew every round; use optimizer_state 'restart'"
        )
    # A client's part of the round is FedIT's.
    client_side = averaging("flexlora", training, shares=("a", "b"))

    def check(specs: Specs) -> None:
        check_adapted("flexlora", specs)
        aggregate.check_alike("flexlora", specs, ("targets", "dtype"))

    def init_server(specs, key, bases, probe) -> FlexServer:
        del bases, probe
        start, factors = {}, {}
        for name, group in aggregate.architectures(specs).items():
            largest = max(specs[place].rank for place in group)
            drawn = init_factors(specs[group[0]], fold_name(key, name), largest)
            start[name] = drawn["a"]
            factors[name] = jax.tree.map(jnp.zeros_like, drawn)
        return FlexServer(start, factors)

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, client_ids, round_index
        return tuple(Download(_at_rank(spec, server), ()) for spec in specs)

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, bases, probe, round_index
        factors = dict(server.factors)
        for name, group in aggregate.architectures(specs).items():
            stacked = aggregate.stack_products(specs, group, uploads, weights, client_ids)
            if stacked is None:
                continue
            columns, valid = stacked
            split: Parts = {"a": {}, "b": {}}
            for kind, (u, v) in columns.items():
                before = factors[name]["a"][kind], factors[name]["b"][kind]
                largest = before[0].shape[-1]
                halves = jax.vmap(lambda u, v, rank=largest: _halves(u, v, rank))(u, v)
                split["a"][kind], split["b"][kind] = (
                    jnp.where(valid.any(), new.astype(old.dtype), old)
                    for new, old in zip(halves, before)
                )
            factors[name] = split
        return server._replace(factors=factors), {}

    def adapters(spec, server, client, download) -> Adapters:
        received = {} if download is None else download.common.factors
        return assemble(spec, {**client.params, **received})

    return client_side._replace(
        init_server=init_server,
        broadcast=broadcast,
        reduce=None,
        server_aggregate=server_aggregate,
        adapters=adapters,
        check=check,
        shared=(),
    )


def _halves(u: Array, v: Array, rank: int) -> tuple[Array, Array]:
    """Split u [D, W] @ v [W, F] into (U sqrt(s) [D, rank], sqrt(s) V [rank, F])."""
    left, values, right = aggregate.low_rank_svd(u, v, rank)
    root = jnp.sqrt(values)
    return left * root[None, :], root[:, None] * right


def _at_rank(spec: CohortSpec, server: FlexServer) -> LoraDownload:
    """Cut the server's factors to a cohort's rank, in units of its scale."""
    name = aggregate.architecture(spec)
    root = spec.scale**0.5
    parts: Parts = {"a": {}, "b": {}}
    for kind in spec.kinds:
        b = server.factors[name]["b"][kind][:, : spec.rank]
        a = server.factors[name]["a"][kind][:, :, : spec.rank] / root
        missing = (b == 0).all(axis=2)[:, None, :]  # bool[Li, 1, r], no such direction
        start = server.start[name][kind][:, :, : spec.rank]
        parts["a"][kind], parts["b"][kind] = jnp.where(missing, start, a), b / root
    return LoraDownload({}, parts)

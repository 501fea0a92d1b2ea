"""What FedRA and Fed-HeLLo share: every client trains some layers of an architecture's LoRA.

The server tells a client which n_i layers it trains this round. The client reads all layers, takes its
own out of the stack, trains these, and sends how they moved: the others have no optimiser state and
nothing to say. (The backward pass still forms a gradient for the whole stack, as layers run in one scan.)
Per layer the server adds the mean over those who trained it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax import aggregate
from h2tune_jax.check import check_choice, check_named_cohorts
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.lora import (
    LoraClient,
    Parts,
    Training,
    assemble,
    check_adapted,
    drift_penalty,
    train,
)
from h2tune_jax.methods.start import init_factors, init_params
from h2tune_jax.methods.traffic import traffic
from h2tune_jax.types import (
    Adapters,
    Array,
    CohortSpec,
    Download,
    PyTree,
    Specs,
    at_least_float32,
    fold_name,
)

AllocateFn = Callable[[CohortSpec, PyTree, Array, int], Array]
"""(spec, the architecture's account, key, n_i) -> i32[n_i], the layers in order. One client."""

RefreshFn = Callable[[Specs, "LayerServer", tuple, PyTree, Array], dict[str, PyTree]]
"""(specs, server after averaging, bases, probe, round) -> accounts by architecture."""


class LayerServer(NamedTuple):
    """The shared LoRA of every architecture, and what layers are chosen by."""

    factors: dict[str, Parts]  # by architecture: "a", "b"
    heads: dict[str, PyTree]  # by name (`head_name`), where they are shared
    accounts: dict[str, PyTree]  # by architecture


class LayerDownload(NamedTuple):
    """What a cohort is sent; which layers a client trains is the personal part, i32[n_i]."""

    factors: Parts
    head: PyTree  # None where heads are personal


class LayerUpload(NamedTuple):
    """What leaves a client."""

    moved: Parts  # "a", "b" by kind: T[n_i, D, r], T[n_i, r, F]
    layers: Array  # i32[n_i]
    head: PyTree


def layer_subsets(
    name: str,
    training: Training,
    *,
    budgets: Mapping[str, int] | None,
    heads: str,
    allocate_fn: AllocateFn,
    account: Callable[[CohortSpec], PyTree] = lambda spec: (),
    refresh_fn: RefreshFn | None = None,
    further_check: Callable[[Specs], None] = lambda specs: None,
) -> FederatedMethod:
    """Build a method that trains subsets of layers.

    Args:
      name: the method's.
      training: its options; the optimiser's state restarts every round, as the layers change.
      budgets: cohort -> n_i; half of the layers, rounded up, for cohorts that it does not name.
      heads: "personal", or "shared": averaged over the cohorts of an architecture that were given the
        same `init_head_fn`.
      allocate_fn: chooses one client's layers.
      account: what an architecture's layers are chosen by, at the start.
      refresh_fn: renews these after every round.
      further_check: what else the method refuses.
    """
    check_choice("heads", heads, ("personal", "shared"))
    budgets = dict(budgets or {})
    shares_heads = heads == "shared"

    def check(specs: Specs) -> None:
        check_adapted(name, specs)
        aggregate.check_alike(name, specs, ("targets", "rank", "alpha", "dtype"))
        check_named_cohorts("budgets", budgets, specs, lambda spec: spec.model.num_layers)
        further_check(specs)

    def budget(spec: CohortSpec) -> int:
        return budgets.get(spec.name, (spec.model.num_layers + 1) // 2)

    def init_server(specs, key, bases, probe) -> LayerServer:
        del bases, probe
        factors, heads, accounts = {}, {}, {}
        for spec in specs:
            own = aggregate.architecture(spec)
            if own not in factors:
                factors[own] = init_factors(spec, fold_name(key, own))
                accounts[own] = account(spec)
            place = head_name(specs, spec)
            if shares_heads and spec.init_head_fn is not None and place not in heads:
                heads[place] = spec.init_head_fn(fold_name(key, place))
        return LayerServer(factors, heads, accounts)

    def init_client(spec: CohortSpec, key: Array, base: PyTree, download: Download) -> LoraClient:
        del base, download
        return LoraClient(init_params(spec, key), ())

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del round_index
        downloads = []
        for spec, ids in zip(specs, client_ids):
            own, cohort_key = aggregate.architecture(spec), fold_name(key, spec.name)
            choose = lambda i, spec=spec, own=own, cohort_key=cohort_key: allocate_fn(
                spec, server.accounts[own], jax.random.fold_in(cohort_key, i), budget(spec)
            )
            head = server.heads.get(head_name(specs, spec))
            downloads.append(
                Download(LayerDownload(server.factors[own], head), jax.vmap(choose)(ids))
            )
        return tuple(downloads)

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        (factors, head), layers = download
        start: Parts = jax.tree.map(lambda leaf: leaf[layers], factors)
        if head is not None:
            start["head"] = head

        def whole(params: Parts) -> Parts:
            moved = {name: params[name] for name in ("a", "b")}
            put = lambda leaf, part: leaf.at[layers].set(part, unique_indices=True)
            return {**jax.tree.map(put, factors, moved), "head": params["head"]}

        params, _, metrics = train(
            training, spec, key, base, data, hyper,
            {"head": client.params["head"], **start}, (),
            adapters_fn=lambda params: assemble(spec, whole(params)),
            penalty_fn=drift_penalty(drift_fn, start),
        )  # fmt: skip
        moved = {name: jax.tree.map(jnp.subtract, params[name], start[name]) for name in "ab"}
        sent = LayerUpload(moved, layers, None if head is None else params["head"])
        numbers = traffic(up=sent, down=download)
        return LoraClient(whole(params), ()), sent, {**metrics, **numbers}

    def reduce(spec: CohortSpec, upload: LayerUpload, weight: Array):
        depth = spec.model.num_layers

        def spread(leaf: Array) -> Array:
            dtype = at_least_float32(leaf.dtype)
            rows = jnp.zeros((depth, *leaf.shape[1:]), dtype)
            return rows.at[upload.layers].add(leaf.astype(dtype) * weight.astype(dtype))

        holders = jnp.zeros(depth, weight.dtype).at[upload.layers].add(weight)
        head = None if upload.head is None else aggregate.weighted_part(upload.head, weight)
        return jax.tree.map(spread, upload.moved), holders, head

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, weights, client_ids
        factors, heads = dict(server.factors), dict(server.heads)
        for own, group in aggregate.architectures(specs).items():
            parts = [uploads[i][:2] for i in group if uploads[i] is not None]
            if parts:
                total, holders = jax.tree.map(lambda *leaves: sum(leaves), *parts)
                factors[own] = _add_means(factors[own], total, holders)
        for place in heads:
            members = [i for i, spec in enumerate(specs) if head_name(specs, spec) == place]
            parts = [uploads[i][2] for i in members if uploads[i] is not None]
            if parts:
                total, share = jax.tree.map(lambda *leaves: sum(leaves), *parts)
                heads[place] = aggregate.mean_or_keep(total, share, heads[place])
        server = server._replace(factors=factors, heads=heads)
        if refresh_fn is not None:
            accounts = refresh_fn(specs, server, bases, probe, round_index)
            server = server._replace(accounts=accounts)
        return server, {}

    def adapters(spec, server, client, download) -> Adapters:
        del server
        params = client.params
        if download is not None:
            factors, head = download.common
            params = {**params, **factors, **({} if head is None else {"head": head})}
        return assemble(spec, params)

    return FederatedMethod(
        name=name,
        hyper=training.hyper(),
        init_server=init_server,
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        reduce=reduce,
        server_aggregate=server_aggregate,
        adapters=adapters,
        check=check,
        shared=("factors", "heads"),
        sends_change=True,
    )


def head_name(specs: Specs, spec: CohortSpec) -> str:
    """Name the head that a cohort shares: that of the first cohort with its architecture and maker."""
    same = lambda other: (
        other.init_head_fn == spec.init_head_fn
        and aggregate.architecture(other) == aggregate.architecture(spec)
    )
    return next(other.name for other in specs if same(other))


def draw_layers(key: Array, weights: Array, count: int) -> Array:  # i32[count]
    """Draw layers without replacement with chances in proportion to weights [L], in order.

    Gumbel noise on the logarithms: the `count` largest are such a draw.
    """
    chances = jnp.log(weights.astype(jnp.float32))
    noise = jax.random.gumbel(key, weights.shape, jnp.float32)
    _, layers = jax.lax.top_k(chances + noise, count)
    return jnp.sort(layers.astype(jnp.int32))


def _add_means(factors: Parts, total: Parts, holders: Array) -> Parts:
    """theta_l += the mean over those who trained layer l; others stay."""

    def add(leaf: Array, moved: Array) -> Array:
        count = jnp.where(holders > 0, holders, 1).astype(moved.dtype)
        mean = moved / count.reshape((-1,) + (1,) * (moved.ndim - 1))
        return leaf + mean.astype(leaf.dtype)

    return jax.tree.map(add, factors, total)

"""HetLoRA (Cho et al., EMNLP 2024, arXiv 2401.06432): averages of factors of different ranks.

    A = sum_i s_i [A_i, 0],    B = sum_i s_i [B_i; 0],    s_i ~ w_i |A_i B_i|_F,

and client i gets the first r_i columns of A and rows of B. What nobody of a round holds stays as it was.
Where scales alpha / r_i differ, factors are averaged and weighed in units of the largest rank's scale, and
a client's are divided by the root of what its own is of it: a column does the same everywhere.

Ranks prune themselves: a client adds lambda |A tail| |B tail| to its loss, the tail being the last
(1 - gamma) r columns of A and rows of B; where that product has fallen during local training, it drops
the tail. Shapes being static, a rank is a mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from h2tune_jax import aggregate
from h2tune_jax.check import check_choice, check_not_negative
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.lora import (
    Parts,
    Training,
    assemble,
    check_adapted,
    drift_penalty,
    train,
)
from h2tune_jax.methods.start import init_factors, init_params
from h2tune_jax.methods.traffic import Units, traffic
from h2tune_jax.training import Schedule
from h2tune_jax.types import (
    Adapters,
    Array,
    CohortSpec,
    Download,
    FederationError,
    PyTree,
    Specs,
    at_least_float32,
    fold_name,
)


class HetLoraServer(NamedTuple):
    """The means, by architecture, at its largest rank."""

    factors: dict[str, Parts]


class HetLoraUpload(NamedTuple):
    """What leaves a client."""

    factors: Parts  # zero beyond its rank
    mask: Parts | None  # bool[1, 1, r], bool[1, r, 1]: its rank; None where ranks never shrink


class HetLoraClient(NamedTuple):
    """A client's parts and its rank by now."""

    params: Parts
    opt: PyTree
    rank: Array  # i32[], columns beyond it are zero


class HetLoraHyper(NamedTuple):
    """Traced settings, all scalars."""

    learning_rate: Array
    head_rate: Array
    weight_decay: Array
    lambda_tail: Array


def hetlora(
    *,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
    weighting: str = "norm",
    gamma: float = 0.99,
    lambda_tail: float = 5e-3,
) -> FederatedMethod:
    """Build HetLoRA. The options that are not named here are those of `local`; heads are personal.

    Args:
      weighting: "norm" weighs a client by the norm of its product over all sites, times its given
        weight; "given" by the latter alone.
      gamma: share of the rank that a pruning keeps, rounded down; 1 never prunes. One rank a client,
        for all of its sites, and its tail's norms are over all of them.
      lambda_tail: weight of the tail's term.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    check_choice("weighting", weighting, ("norm", "given"))
    check_not_negative("lambda_tail", lambda_tail)
    if not 0 < gamma <= 1:
        raise FederationError(f"gamma: must lie in (0, 1], got {gamma}")
    prunes = gamma < 1

    def check(specs: Specs) -> None:
        check_adapted("hetlora", specs)
        aggregate.check_alike("hetlora", specs, ("targets", "dtype"))

    def init_server(specs, key, bases, probe) -> HetLoraServer:
        del bases, probe
        factors = {}
        for name, group in aggregate.architectures(specs).items():
            largest = max(specs[place].rank for place in group)
            factors[name] = init_factors(specs[group[0]], fold_name(key, name), largest)
        return HetLoraServer(factors)

    def init_client(spec, key, base, download) -> HetLoraClient:
        del base, download
        params = init_params(spec, key)
        return HetLoraClient(params, training.start(params), jnp.asarray(spec.rank, jnp.int32))

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, client_ids, round_index
        units = _units(specs)
        return tuple(
            Download(_first(server.factors[aggregate.architecture(spec)], spec.rank, unit), ())
            for spec, unit in zip(specs, units)
        )

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        columns = jnp.arange(spec.rank, dtype=jnp.int32)
        active = columns < client.rank
        factors = _mask(download.common, active)
        left = _ranks_left(gamma, spec.rank)[client.rank]
        tail = active & (columns >= left)
        drift = drift_penalty(drift_fn, factors)

        def penalty(params: Parts) -> Array:
            product = _tail_product(params, tail)
            term = hyper.lambda_tail.astype(product.dtype) * product
            return term if drift is None else term + drift(params).astype(term.dtype)

        params = {**client.params, **factors}
        keep = dict.fromkeys(params) | _columns(factors, active)
        keep["head"] = jax.tree.map(lambda _: None, params["head"])
        params, opt, metrics = train(
            training, spec, key, base, data, hyper, params, client.opt,
            adapters_fn=lambda params: assemble(spec, params),
            penalty_fn=penalty if prunes else drift,
            keep=keep,
        )  # fmt: skip
        rank = client.rank
        if prunes:
            fell = _tail_product(params, tail) < _tail_product(factors, tail)
            rank = jnp.where(fell, left, rank)
            params = {**params, **_mask(params, columns < rank)}
        column = {
            kind: (factors["a"][kind][..., 0], factors["b"][kind][:, 0]) for kind in spec.kinds
        }
        numbers = traffic(
            up=Units(rank, column, spec.rank), down=Units(client.rank, column, spec.rank)
        )
        sent = HetLoraUpload(
            {part: params[part] for part in ("a", "b")},
            _columns(factors, columns < rank) if prunes else None,
        )
        return HetLoraClient(params, opt, rank), sent, {**metrics, "rank": rank, **numbers}

    def reduce(spec: CohortSpec, upload: HetLoraUpload, weight: Array) -> tuple[PyTree, PyTree]:
        factors = upload.factors
        if upload.mask is not None:
            # Zeros already, but in the ones by which a server optimiser asks who brought what.
            cut = lambda leaf, held: jnp.where(held, leaf, 0)
            factors = jax.tree.map(cut, factors, upload.mask)
        if weighting == "norm":
            a, b = factors["a"], factors["b"]
            norms = [aggregate.product_norm(a[kind], b[kind]) for kind in spec.kinds]
            weight = weight * jnp.linalg.norm(jnp.concatenate(norms)).astype(weight.dtype)
        return aggregate.weighted_part(factors, weight)

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, bases, probe, weights, client_ids, round_index
        padded = []
        for spec, part, unit in zip(specs, uploads, _units(specs)):
            if part is not None:
                largest = server.factors[aggregate.architecture(spec)]
                # Its scale is a cohort's own, so both can wait until its clients are summed.
                share = unit if weighting == "norm" else 1.0
                times = lambda tree, factor: jax.tree.map(lambda leaf: factor * leaf, tree)
                part = _pad(times(part[0], share * unit**0.5), largest), times(part[1], share)
            padded.append(part)
        factors = aggregate.mean_by_architecture(specs, tuple(padded), server.factors)
        return HetLoraServer(
            {name: _alive(factors[name], server.factors[name]) for name in factors}
        ), {}

    def adapters(spec, server, client, download) -> Adapters:
        params = client.params
        if download is not None:
            active = jnp.arange(spec.rank, dtype=jnp.int32) < client.rank
            params = {**params, **_mask(download.common, active)}
        return assemble(spec, params)

    plain = training.hyper()
    tail_weight = jnp.asarray(lambda_tail, plain.learning_rate.dtype)
    return FederatedMethod(
        name="hetlora",
        hyper=HetLoraHyper(*plain, tail_weight),
        init_server=init_server,
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        reduce=reduce,
        server_aggregate=server_aggregate,
        adapters=adapters,
        check=check,
        shared=("factors",),
    )


def _ranks_left(gamma: float, rank: int) -> Array:  # i32[r + 1]
    """Say for each rank what a pruning leaves of it: gamma of it, and one at least."""
    left = np.floor(gamma * np.arange(rank + 1) + 1e-9)
    return jnp.asarray(np.maximum(left, 1), jnp.int32)


def _mask(factors: Parts, active: Array) -> Parts:
    """Zero the columns of A and the rows of B that are not active, bool[r]."""
    return {
        "a": jax.tree.map(lambda a: jnp.where(active[None, None, :], a, 0), factors["a"]),
        "b": jax.tree.map(lambda b: jnp.where(active[None, :, None], b, 0), factors["b"]),
    }


def _columns(factors: Parts, active: Array) -> Parts:
    """Give every factor the mask of what is active, bool[r]: of its columns (A) or rows (B)."""
    shapes = {"a": (1, 1, -1), "b": (1, -1, 1)}
    return {
        part: jax.tree.map(lambda _, shape=shape: active.reshape(shape), factors[part])
        for part, shape in shapes.items()
    }


def _units(specs: Specs) -> tuple[float, ...]:
    """Return each cohort's scale over that of its architecture's largest rank."""
    units = [1.0] * len(specs)
    for group in aggregate.architectures(specs).values():
        largest = max(group, key=lambda place: specs[place].rank)  # the first of them
        for place in group:
            units[place] = specs[place].scale / specs[largest].scale
    return tuple(units)


def _first(factors: Parts, rank: int, unit: float) -> Parts:
    """Truncate to a rank, in units of a cohort's scale."""
    root = unit**0.5
    return {
        "a": jax.tree.map(lambda a: a[:, :, :rank] / root, factors["a"]),
        "b": jax.tree.map(lambda b: b[:, :rank, :] / root, factors["b"]),
    }


def _pad(factors: Parts, like: Parts) -> Parts:
    """Append zero columns and rows up to the shapes of `like`."""

    def grow(leaf: Array, wanted: Array) -> Array:
        return jnp.pad(leaf, [(0, b - a) for a, b in zip(leaf.shape, wanted.shape)])

    return jax.tree.map(grow, factors, like)


def _alive(factors: Parts, before: Parts) -> Parts:
    """Keep columns that nobody of the round holds: zeros in both factors would never train again."""
    alive: Parts = {"a": {}, "b": {}}
    for kind, a in factors["a"].items():
        b = factors["b"][kind]
        dead = (a == 0).all(axis=1) & (b == 0).all(axis=2)  # bool[Li, r]
        alive["a"][kind] = jnp.where(dead[:, None, :], before["a"][kind], a)
        alive["b"][kind] = jnp.where(dead[:, :, None], before["b"][kind], b)
    return alive


def _tail_product(factors: Parts, tail: Array) -> Array:
    """|A tail| |B tail| over all sites, with derivative 0 where either is zero."""
    norms = []
    for part in _mask(factors, tail).values():
        squares = [
            jnp.square(leaf.astype(at_least_float32(leaf.dtype))).sum()
            for leaf in jax.tree.leaves(part)
        ]
        total = jnp.stack(squares).sum()
        norms.append(jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1)), 0))
    return norms[0] * norms[1]

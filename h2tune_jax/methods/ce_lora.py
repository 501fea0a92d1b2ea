"""CE-LoRA (Li et al. 2025, arXiv 2503.23869): dW = scale * A C B, of which only C [r, r] travels.

C starts at the identity, and is held and sent as what it has learned, C - I: so weight decay pulls it back
to its start. The server sends client i a mean of its own, sum_j w_ij C_j over the clients of its
architecture (itself included), w from how alike clients are in their data and in their parameters. A and B
stay personal.

The paper's text on both similarities was not at hand; this is our reading.

- Data: every client sends mean and standard deviation of the frozen base's last layer over some of its own
  examples, nothing finer. Two clients are W2^2 = |m_i - m_j|^2 + |s_i - s_j|^2 apart (the Wasserstein
  distance of Gaussians with these moments and independent coordinates), and
  s_data = exp(-W2^2 / its mean over the other clients).
- Parameters: s_param = cosine of C_i - I and C_j - I, all sites together.
- w_ij in proportion to w_j exp(((1 - lambda) s_param + lambda s_data) / tau), w_j the client's weight.

B starts at zero, and so does dW; A starts alike within an architecture, as averages of C would mean nothing
between factors that were drawn apart. Clients that were not sampled count with what they last sent.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax import aggregate
from h2tune_jax.check import check_positive, check_whole
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.latest import Latest, for_each, nobody_yet, note_round
from h2tune_jax.methods.lora import (
    LoraClient,
    Parts,
    Training,
    assemble,
    check_adapted,
    drift_penalty,
    train,
)
from h2tune_jax.methods.start import init_factors, init_head
from h2tune_jax.methods.traffic import traffic
from h2tune_jax.precision import exact
from h2tune_jax.training import Schedule
from h2tune_jax.types import (
    Adapters,
    Array,
    ClientData,
    CohortSpec,
    Download,
    FederationError,
    PyTree,
    Specs,
    at_least_float32,
    fold_name,
)

Cores = dict[str, Array]  # C - I by kind: T[Li, r, r]


class CeLoraUpload(NamedTuple):
    """What leaves a client."""

    cores: Cores
    moments: Array | None  # f32[2, d], mean and standard deviation; None where data do not count


class CeLoraServer(NamedTuple):
    """The factors that an architecture's clients start from, and what each client has last sent."""

    start: dict[str, Parts]  # by architecture: "a", "b"
    latest: tuple[Latest, ...]  # a cohort; what was sent is a `CeLoraUpload`


def ce_lora(
    *,
    data_share: float = 0.5,
    temperature: float = 0.5,
    num_examples: int = 64,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build CE-LoRA. The options that are not named here are those of `local`; heads are personal.

    Args:
      data_share: lambda, the part of the data in the similarity. Above 0 the models need
        `layer_outputs_fn`, which is then given clients' examples for its probe.
      temperature: tau.
      num_examples: how many of a client's examples, its first, the moments are taken over.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    if not 0 <= data_share <= 1:
        raise FederationError(f"data_share: must lie in [0, 1], got {data_share}")
    check_positive("temperature", temperature)
    check_whole("num_examples", num_examples)

    def check(specs: Specs) -> None:
        check_adapted("ce_lora", specs)
        aggregate.check_alike("ce_lora", specs, ("targets", "rank", "alpha", "dtype"))
        for spec in specs:
            if data_share > 0 and (spec.model.layer_outputs_fn is None or spec.model.width is None):
                raise FederationError(
                    f"cohort {spec.name!r}: ce_lora needs model.layer_outputs_fn and model.width, or "
                    "data_share=0"
                )

    def init_server(specs, key, bases, probe) -> CeLoraServer:
        del bases, probe
        start, latest = {}, []
        for spec in specs:
            own = aggregate.architecture(spec)
            start[own] = init_factors(spec, fold_name(key, own))
            moments = jnp.zeros((2, spec.model.width), jnp.float32) if data_share > 0 else None
            latest.append(nobody_yet(spec.num_clients, CeLoraUpload(_first_cores(spec), moments)))
        return CeLoraServer(start, tuple(latest))

    def init_client(spec: CohortSpec, key: Array, base: PyTree, download: Download) -> LoraClient:
        del base
        params = {**download.common, "c": _first_cores(spec), "head": init_head(spec, key)}
        return LoraClient(params, training.start(params))

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, round_index
        groups = aggregate.architectures(specs)
        downloads = []
        for place, (spec, ids) in enumerate(zip(specs, client_ids)):
            own = aggregate.architecture(spec)
            group = groups[own]
            alike = [server.latest[i] for i in group]
            everyone: Latest = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *alike)
            before = sum(specs[i].num_clients for i in group if i < place)

            def mean(client, everyone=everyone, before=before) -> Cores:
                return personal_mean(
                    *everyone, before + client, data_share=data_share, tau=temperature
                )

            downloads.append(Download(server.start[own], for_each(ids, mean)))
        return tuple(downloads)

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        start = {"c": download.personal}
        params, opt, metrics = train(
            training, spec, key, base, data, hyper, {**client.params, **start}, client.opt,
            adapters_fn=lambda params: assemble(spec, params, core=params["c"]),
            penalty_fn=drift_penalty(drift_fn, start),
        )  # fmt: skip
        moments = _moments(spec, base, data, num_examples) if data_share > 0 else None
        sent = CeLoraUpload(params["c"], moments)
        return LoraClient(params, opt), sent, {**metrics, **traffic(up=sent, down=start)}

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del specs, key, bases, probe, round_index
        latest = note_round(server.latest, uploads, weights, client_ids)
        return server._replace(latest=latest), {}

    def adapters(spec, server, client, download) -> Adapters:
        del server
        core = client.params["c"] if download is None else download.personal
        return assemble(spec, client.params, core=core)

    return FederatedMethod(
        name="ce_lora",
        hyper=training.hyper(),
        init_server=init_server,
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        reduce=None,  # every client gets a mean of its own
        server_aggregate=server_aggregate,
        adapters=adapters,
        check=check,
        shared=(),
    )


@exact
def personal_mean(
    everyone: CeLoraUpload,  # leaves [N, ...]
    weights: Array,  # f32[N]
    client: Array,  # i32[]
    *,
    data_share: float,
    tau: float,
) -> Cores:
    """Average the cores of an architecture as one of its clients should see them; see the module.

    Where nobody was heard, its own (the start). A client that was not heard is like all others.
    """
    heard = weights > 0
    known = heard[client]
    similar = jnp.zeros_like(weights)
    if data_share < 1:
        cores = [core.astype(jnp.float32) for core in everyone.cores.values()]
        flat = jnp.concatenate([core.reshape(core.shape[0], -1) for core in cores], axis=1)
        norms = jnp.linalg.norm(flat, axis=1)
        both = norms * norms[client]
        cosine = jnp.where(both > 0, flat @ flat[client] / jnp.where(both > 0, both, 1), 0)
        similar = similar + (1 - data_share) * cosine
    if everyone.moments is not None and data_share > 0:
        flat = everyone.moments.reshape(weights.shape[0], -1)
        apart = jnp.square(flat - flat[client][None]).sum(axis=1)
        others = weights.at[client].set(0)
        total = others.sum()
        scale = (others * apart).sum() / jnp.where(total > 0, total, 1)
        similar = similar + data_share * jnp.exp(-apart / jnp.where(scale > 0, scale, 1))
    (shares,) = aggregate.shares_of_alike((jnp.where(known, similar, 0),), (weights,), tau)
    total = shares.sum()

    def mean(cores: Array) -> Array:
        dtype = at_least_float32(cores.dtype)
        mixed = jnp.tensordot(shares.astype(dtype), cores.astype(dtype), axes=1)
        mixed = mixed / jnp.where(total > 0, total, 1).astype(dtype)
        return jnp.where(total > 0, mixed.astype(cores.dtype), cores[client])

    return {kind: mean(cores) for kind, cores in everyone.cores.items()}


def _first_cores(spec: CohortSpec) -> Cores:
    none = jnp.zeros((spec.model.num_layers, spec.rank, spec.rank), spec.dtype)
    return dict.fromkeys(spec.kinds, none)


def _moments(spec: CohortSpec, base: PyTree, data: ClientData, num_examples: int) -> Array:
    """Mean and standard deviation [2, d] of the frozen base's last layer over a client's examples."""
    fn = spec.model.layer_outputs_fn
    assert fn is not None  # `check` saw to it
    examples = jax.tree.map(lambda leaf: leaf[:num_examples], data.examples)
    rows = fn(base, examples)[-1].astype(jnp.float32)
    held = (jnp.arange(rows.shape[0], dtype=jnp.int32) < data.num_examples)[:, None]
    count = jnp.maximum(held.sum(), 1).astype(jnp.float32)
    average = lambda values: jnp.where(held, values, 0).sum(axis=0) / count
    mean = average(rows)
    return jnp.stack([mean, jnp.sqrt(average(jnp.square(rows - mean[None])))])

"""Co-LoRA, as in FedMosaic (Seo et al., ICLR 2026, arXiv 2506.11024): models of different widths share
a small map between aligned, frozen factors.

At the last layer of each of `num_blocks` equal blocks a site computes

    y = x W + scale * ((x A) P + Q) B,

A and B fitted once on public text so that they mean the same in every architecture (`align.py`), then
frozen; P [r, r] and Q [r] start at zero and travel. Every client has two branches, mixed by a gate per
token (`adapters/gated.py`): its local one, which it trains and sends, and a shared one, which the server
sets to sum over j != i of softmax(sim_ij / tau) (P_j, Q_j). sim is the cosine of the clients' sketched
gradients. The other layers have plain LoRA factors, mixed among equal architectures by the same weights.

Our reading, where the paper's text was not at hand: the gradients compared are those with respect to P
and Q, which live in the common coordinates, summed over a round's steps, without the pull of `proximal`;
the gate is, per site and token, the sigmoid of a linear map (with a bias) of x A_local; the other layers
have the same two branches and gates, and start alike in equal architectures; the shared branch is held
still while a client trains, and `proximal` pulls the local one to it; clients that were not sampled count
with what they last sent; and a client's weight in its round multiplies its share.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from h2tune_jax import aggregate
from h2tune_jax.check import check_positive, check_whole
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.co_lora.align import fit_factors
from h2tune_jax.methods.co_lora.parts import assemble, start_factors, start_parts, travelling
from h2tune_jax.methods.co_lora.state import (
    CoLoraClient,
    CoLoraServer,
    CoLoraUpload,
    Parts,
    hear,
    sketch,
    sketch_size,
)
from h2tune_jax.methods.latest import for_each, nobody_yet, note_round
from h2tune_jax.methods.lora import Training, check_adapted, drift_penalty, train
from h2tune_jax.methods.start import init_head
from h2tune_jax.methods.traffic import traffic
from h2tune_jax.training import Schedule, widen
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

Penalty = Callable[[Parts], Array]


def co_lora(
    *,
    num_blocks: int | None = None,
    temperature: float = 0.5,
    sketch_numbers: int = 64,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build Co-LoRA. `init_round` needs a probe, the models `site_activations_fn`, all equal ranks.

    Args:
      num_blocks: into how many equal blocks of layers every model is cut; None means four, or as many
        as the shallowest model has layers.
      temperature: tau of the softmax over clients.
      sketch_numbers: how many numbers a kind's gradient is projected to.
      learning_rate: of all but the head. It and what follows is as in `local`.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    check_whole("num_blocks", num_blocks)
    check_positive("temperature", temperature)
    check_whole("sketch_numbers", sketch_numbers)

    def that_notes(penalty: Penalty | None) -> Training:
        return dataclasses.replace(
            training,
            optimizer=optax.chain(_sum_gradients(("p", "q"), penalty), training.transform),
            optimizer_state="kept",  # for the round: `client_update` decides what is kept beyond it
        )

    def blocks_of(specs: Specs) -> int:
        return num_blocks or min(4, *(spec.model.num_layers for spec in specs))

    def check(specs: Specs) -> None:
        check_adapted("co_lora", specs)
        aggregate.check_alike("co_lora", specs, ("targets",))
        for spec in specs:
            where = f"cohort {spec.name!r}"
            for field in ("rank", "alpha", "dtype"):
                ours, theirs = getattr(spec, field), getattr(specs[0], field)
                if ours != theirs:
                    raise FederationError(
                        f"{where}: {field} {ours!r} differs from {theirs!r} of cohort "
                        f"{specs[0].name!r}; co_lora shares P and Q between all clients"
                    )
            if spec.model.site_activations_fn is None:
                raise FederationError(f"{where}: co_lora needs model.site_activations_fn")
            if spec.kernels == "triton":
                raise FederationError(f"{where}: kernels 'triton': no kernel computes gated sites")
            if blocks_of(specs) > spec.model.num_layers:
                raise FederationError(
                    f"{where}: num_blocks {blocks_of(specs)} is above its {spec.model.num_layers} layers"
                )

    def init_server(specs, key, bases, probe) -> CoLoraServer:
        blocks = blocks_of(specs)
        frozen: dict[str, Parts] = fit_factors(specs, fold_name(key, "fit"), bases, probe, blocks)
        latest = []
        for spec in specs:
            name = aggregate.architecture(spec)
            own = frozen[name]
            own["start"] = start_factors(spec, fold_name(key, name), blocks)
            silent = jax.tree.map(jnp.zeros_like, start_parts(spec, own))
            none = jnp.zeros(sketch_size(sketch_numbers, blocks, spec.rank), jnp.float32)
            first = CoLoraUpload(silent, dict.fromkeys(spec.kinds, none))
            latest.append(nobody_yet(spec.num_clients, first))
        return CoLoraServer(frozen, tuple(latest))

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, round_index
        downloads = []
        for place, (spec, ids) in enumerate(zip(specs, client_ids)):
            own = for_each(ids, lambda i, at=place: hear(specs, server, at, i, temperature))
            downloads.append(Download(server.frozen[aggregate.architecture(spec)], own))
        return tuple(downloads)

    def init_client(spec: CohortSpec, key: Array, base: PyTree, download: Download) -> CoLoraClient:
        del base
        shape = spec.model.num_layers, spec.rank + 1
        start = start_parts(spec, download.common)
        params = {
            **start,
            "gate": {kind: jnp.zeros(shape, spec.dtype) for kind in spec.kinds},
            "head": init_head(spec, key),
        }
        return CoLoraClient(params, start, training.start(params))

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        frozen, heard = download.common, download.personal
        penalty = drift_penalty(drift_fn, heard)
        noting = that_notes(penalty)
        fresh: Any = noting.transform.init(widen(client.params))
        summing, inner = fresh
        opt = summing, client.opt if training.kept else inner
        params, (noted, after), metrics = train(
            noting, spec, key, base, data, hyper, client.params, opt,
            adapters_fn=lambda params: assemble(spec, frozen, params, heard),
            penalty_fn=penalty,
        )  # fmt: skip
        sent = CoLoraUpload(travelling(params), sketch(noted, spec.kinds, sketch_numbers))
        client = CoLoraClient(params, heard, after if training.kept else ())
        return client, sent, {**metrics, **traffic(up=sent, down=heard)}

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, bases, probe, round_index
        latest = note_round(server.latest, uploads, weights, client_ids)
        heard = sum((one.weights > 0).sum(dtype=jnp.int32) for one in latest)
        return server._replace(latest=latest), {"heard": heard}

    def adapters(spec, server, client, download) -> Adapters:
        frozen = server.frozen[aggregate.architecture(spec)]
        heard = client.heard if download is None else download.personal
        return assemble(spec, frozen, client.params, heard)

    return FederatedMethod(
        name="co_lora",
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


def _sum_gradients(names: tuple[str, ...], penalty: Penalty | None) -> optax.GradientTransformation:
    """Pass gradients on, and keep the sum of those of some parts, of the task alone."""

    def init(params):
        wide = lambda leaf: jnp.zeros(leaf.shape, at_least_float32(leaf.dtype))
        return {name: jax.tree.map(wide, params[name]) for name in names}

    def update(updates, state, params=None):
        ours = {name: updates[name] for name in names}
        if penalty is not None:
            pull = jax.grad(penalty)(params)
            ours = jax.tree.map(jnp.subtract, ours, {name: pull[name] for name in names})
        add = lambda total, grad: total + grad.astype(total.dtype)
        return updates, jax.tree.map(add, state, ours)

    return optax.GradientTransformation(init, update)

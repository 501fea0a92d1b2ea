"""HeteroTune (Jia et al., arXiv 2411.16796 v2): adapters beside blocks whose branches all models share.

This is our reading. Only the paper's abstract and introduction were at hand; what follows is built from
what they say, and its numbers are no measure of the authors' own code.

DeMA, a dense mixture of adapters, stands beside each block (`adapters/dema.py`). Its projections d -> m and
m -> d are the client's own. Its branches m -> m have one shape in every architecture and are what travels;
client i holds the first n_i of them. Layers meet by relative depth: the server has L slots of branches, and
a layer uses the slot nearest to it. Where a model has more layers than there are slots, layers that meet in
a slot use one set of branches.

CMGA, cross-model gradient alignment, is how the server averages their updates (`cmga.py`).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from h2tune_jax.adapters import dema, relation
from h2tune_jax.adapters.block import BLOCK
from h2tune_jax.check import check_choice, check_named_cohorts, check_whole
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.heterotune.cmga import Branches, Part, mean_update
from h2tune_jax.methods.lora import LoraClient, Training, drift_penalty, train
from h2tune_jax.methods.start import init_head, start_keys
from h2tune_jax.methods.traffic import traffic
from h2tune_jax.training import Schedule
from h2tune_jax.types import (
    Adapters,
    Array,
    CohortSpec,
    Download,
    FederationError,
    PyTree,
    Specs,
)


def heterotune(
    *,
    size: int = 32,
    widths: tuple[int, ...] = (32, 32, 32, 32),
    branches: Mapping[str, int] | None = None,
    num_slots: int | None = None,
    alignment: str = "cmga",
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build HeteroTune.

    Args:
      size: m, the width that branches work in.
      widths: of the branches, in the order in which clients hold them.
      branches: cohort -> n_i, how many of them its clients hold; a cohort that is not named, and every
        cohort if None, holds as large a part of them as its rank is of the largest rank (at least one).
      num_slots: L; None means the number of layers of the deepest model.
      alignment: "cmga", or "none" for the plain mean of the updates.
      learning_rate: of projections and branches. It and what follows is as in `local`.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    check_choice("alignment", alignment, ("cmga", "none"))
    for field, value in {"size": size, "num_slots": num_slots}.items():
        check_whole(field, value)
    widths = tuple(widths)
    if not widths:
        raise FederationError("widths: expected the width of one branch or more")
    for width in widths:
        check_whole("widths", width)
    ends = np.cumsum(widths)

    def check(specs: Specs) -> None:
        check_named_cohorts("branches", branches or {}, specs, lambda spec: len(widths))
        for spec in specs:
            where = f"cohort {spec.name!r}"
            if spec.model.width is None:
                raise FederationError(
                    f"{where}: model.width is not set; heterotune puts adapters beside blocks, which the "
                    "loss function has to add (`beside_block`)"
                )
            if spec.kernels == "triton":
                raise FederationError(
                    f"{where}: kernels 'triton': no kernel computes block adapters"
                )
            if spec.dtype != specs[0].dtype:
                raise FederationError(
                    f"{where}: dtype {spec.dtype} differs from {specs[0].dtype} of cohort "
                    f"{specs[0].name!r}; the shared branches have one dtype"
                )

    def held(specs: Specs, spec: CohortSpec) -> int:
        """Return Wi, the widths together of the branches that a cohort's clients hold."""
        share = spec.rank * len(widths) // max(other.rank for other in specs)
        return int(ends[(branches or {}).get(spec.name, max(share, 1)) - 1])

    def slots_of(specs: Specs, spec: CohortSpec) -> np.ndarray:
        """Return the slots U that a model's layers meet in: all of them, or one a layer."""
        return np.unique(_nearest(_num_slots(num_slots, specs), spec.model.num_layers))

    def init_server(specs, key, bases, probe) -> Branches:
        del bases, probe
        slots = _num_slots(num_slots, specs)
        return Branches(*dema.init_branches(key, slots, size, widths, specs[0].dtype))

    def broadcast(specs, key, server, client_ids, round_index) -> tuple[Download, ...]:
        del key, client_ids, round_index
        downloads = []
        for spec in specs:
            slots, width = slots_of(specs, spec), held(specs, spec)
            own = Branches(server.inner[slots, :, :width], server.outer[slots, :width])
            downloads.append(Download(own, ()))
        return tuple(downloads)

    def init_client(spec: CohortSpec, key: Array, base: PyTree, download: Download) -> LoraClient:
        del base
        project_key, _ = start_keys(key)
        layers, width = spec.model.num_layers, spec.model.width
        assert width is not None  # `check` saw to it
        down, up = dema.init_projections(project_key, layers, width, size, spec.dtype)
        params = {
            "down": down,
            "up": up,
            # Of the download only the shapes: a start must not depend on when a client is first seen.
            "branches": jax.tree.map(jnp.zeros_like, download.common),
            "head": init_head(spec, key),
        }
        return LoraClient(params, training.start(params))

    def assemble(spec: CohortSpec, params: dict[str, Any]) -> Adapters:
        # As many slots as layers mean one a layer, whatever L is; fewer mean all slots.
        slot = _nearest(params["branches"].inner.shape[0], spec.model.num_layers)
        mixture = dema.Dema(
            down=params["down"],
            inner=params["branches"].inner[slot],
            outer=params["branches"].outer[slot],
            up=params["up"],
            dropout=spec.dropout,
        )
        return Adapters({BLOCK: mixture}, params["head"])

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        del round_index
        start: Branches = download.common
        params, opt, metrics = train(
            training, spec, key, base, data, hyper, {**client.params, "branches": start}, client.opt,
            adapters_fn=lambda params: assemble(spec, params),
            penalty_fn=drift_penalty(drift_fn, {"branches": start}),
        )  # fmt: skip
        update = jax.tree.map(jnp.subtract, params["branches"], start)
        return LoraClient(params, opt), update, {**metrics, **traffic(up=update, down=start)}

    def server_aggregate(
        specs, key, server, bases, probe, uploads, weights, client_ids, round_index
    ):
        del key, bases, probe, client_ids, round_index
        parts = [
            Part(slots_of(specs, spec), held(specs, spec), upload, weight)
            for spec, upload, weight in zip(specs, uploads, weights)
            if upload is not None
        ]
        step, conflicts = mean_update(server, parts, ends, aligned=alignment == "cmga")
        moved = jax.tree.map(lambda old, new: old + new.astype(old.dtype), server, step)
        return moved, {"conflicts": conflicts}

    def adapters(spec, server, client, download) -> Adapters:
        del server
        params = client.params
        return assemble(
            spec, params if download is None else {**params, "branches": download.common}
        )

    return FederatedMethod(
        name="heterotune",
        hyper=training.hyper(),
        init_server=init_server,
        init_client=init_client,
        broadcast=broadcast,
        client_update=client_update,
        reduce=None,  # the rule compares every update with their mean
        server_aggregate=server_aggregate,
        adapters=adapters,
        check=check,
        shared=Branches._fields,
        sends_change=True,
    )


def _num_slots(num_slots: int | None, specs: Specs) -> int:
    return num_slots or max(spec.model.num_layers for spec in specs)


def _nearest(num_slots: int, num_layers: int) -> np.ndarray:
    with jax.ensure_compile_time_eval():
        return np.asarray(relation.nearest_slots(num_slots, relation.whole(num_layers)))

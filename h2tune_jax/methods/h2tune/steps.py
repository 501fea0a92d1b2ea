"""The local steps of H2Tune: the warm start's joint step, and the alternating one with its halves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.adapters import relation, triple
from h2tune_jax.adapters.parallel import ParallelSite
from h2tune_jax.adapters.site import SiteAdapter
from h2tune_jax.method import DriftFn
from h2tune_jax.methods.h2tune import terms
from h2tune_jax.methods.h2tune.options import H2TuneHyper, H2TuneOptions
from h2tune_jax.methods.h2tune.state import Basis, H2TuneClient
from h2tune_jax.training import descend, narrow, pace, scalar_metrics
from h2tune_jax.types import Adapters, Array, Batch, CohortSpec, FederationError, Metrics, PyTree

Part = dict[str, Any]  # the shared or the specific part of a client, by the names below


def shared_part(options: H2TuneOptions, client: H2TuneClient, downloaded: Array) -> Part:
    """What the shared half trains: a copy of G with P (or the client's own M), and S."""
    part: Part = {"middle": downloaded}
    if not options.trains_copy:
        part = {"middle": relation.mix(client.relation, downloaded)}
    elif options.train_relation:
        part["relation"] = client.relation
    if options.trains_scores:
        part["scores"] = client.scores
    return part


def own_part(options: H2TuneOptions, client: H2TuneClient) -> Part:
    """What the specific half trains: A, B, and the head."""
    factors = {"a": client.a, "b": client.b} if options.train_factors else {}
    return {"head": client.head, **factors}


def middle_of(options: H2TuneOptions, client: H2TuneClient, shared: Part) -> Array:
    """Return M [Li, Ki, R, R] of a shared part."""
    if options.trains_copy:
        return relation.mix(shared.get("relation", client.relation), shared["middle"])
    return shared["middle"]


def select(
    options: H2TuneOptions,
    spec: CohortSpec,
    client: H2TuneClient,
    scores: Array | None,
    middle: Array,
) -> Array:
    """Choose the active entries, i32[Li, Ki, r*r]."""
    if options.selection == "random":
        return client.active  # drawn once, at the client's start
    return triple.select(scores, options.side(spec), strategy=options.selection, middle=middle)


def core_of(
    options: H2TuneOptions,
    spec: CohortSpec,
    middle: Array,
    index: Array,
    scores: Array | None = None,
) -> Array:
    """Take T [Li, Ki, r, r] out of M [Li, Ki, R, R]: the active entries."""
    if options.selection == "leading":  # what `triple.core` gathers there is a slice
        side = options.side(spec)
        return middle[..., :side, :side]
    return triple.core(middle, index, scores=scores)


def site_adapters(
    options: H2TuneOptions,
    spec: CohortSpec,
    basis: Basis | None,
    a: dict,
    b: dict,
    core: Array,
    index: Array,
) -> dict[str, SiteAdapter] | dict[str, ParallelSite]:
    """Put A, T [Li, Ki, r, r], B together by kind; beside A and B, where T stands in the basis."""
    if options.parallel:
        assert basis is not None  # `H2TuneOptions` refuses core "parallel" without
        sites = {}
        for place, kind in enumerate(spec.kinds):
            columns, rows = basis[kind]
            assert rows is not None
            side = core.shape[-1]
            if options.selection == "leading":  # the same for all clients, who share one array
                u, v = columns[..., :side], rows[..., :side].mT
            else:
                chosen = triple.coordinates(index[:, place], side, columns.shape[-1])
                u, v = triple.take_columns(columns, chosen), triple.take_columns(rows, chosen).mT
            sites[kind] = ParallelSite(
                a=a[kind],
                b=b[kind],
                u=u,
                core=core[:, place],
                v=v,
                scale=spec.scale,
                dropout=spec.dropout,
            )
        return sites
    return {
        kind: SiteAdapter(
            a=a[kind],
            core=core[:, place],
            b=b[kind],
            scale=spec.scale,
            residual=options.residual,
            dropout=spec.dropout,
            kernels=spec.kernels,
        )
        for place, kind in enumerate(spec.kinds)
    }


class LocalState(NamedTuple):
    """What local training carries from step to step."""

    shared: Part
    own: Part
    shared_opt: PyTree
    own_opt: PyTree
    touched: Array  # bool[L, Ki, R, R], entries of G that were active in this round


class LocalRound(NamedTuple):
    """What stays fixed during one client's round."""

    options: H2TuneOptions
    spec: CohortSpec
    base: PyTree
    client: H2TuneClient  # as it was after download
    wide: H2TuneClient  # the same in the dtypes that it is trained in: see `widen`
    hyper: H2TuneHyper
    basis: Basis | None
    size: int  # R
    downloaded: Array  # [L, Ki, R, R], the G (or [Li, Ki, R, R], the M) of the start, wide
    drift_fn: DriftFn | None

    def entries(self, index: Array) -> Array:
        """Entries of G that a selection reaches through any layer, bool[L, Ki, R, R]."""
        return relation.entry_support(self.client.relation, index, self.size)

    def selection(self, shared: Part) -> Array:
        """Return the active entries at this step."""
        constant = self.options.selection in ("leading", "score_frozen", "random")
        if self.options.select_at == "download" or constant:
            return self.client.active
        scores = shared.get("scores", self.client.scores)
        middle = middle_of(self.options, self.wide, shared)
        return select(self.options, self.spec, self.client, scores, middle)

    def task(self, shared: Part, own: Part, index: Array, batch: Batch, key: Array):
        """Evaluate the task loss: -> (loss, T [Li, Ki, r, r], the loss function's metrics).

        The parts are wide, and so is T; the model gets them in their own dtypes.
        """
        middle = middle_of(self.options, self.wide, shared)
        core = core_of(self.options, self.spec, middle, index, shared.get("scores"))
        own = narrow(own, own_part(self.options, self.client))
        a, b = own.get("a", self.client.a), own.get("b", self.client.b)
        held = core.astype(self.spec.dtype)
        sites = site_adapters(self.options, self.spec, self.basis, a, b, held, index)
        loss, metrics = self.spec.loss_fn(Adapters(sites, own["head"]), self.base, batch, key)
        return loss, core, metrics

    def norm(self, shared: Part, core: Array, dtype) -> Array:
        """lambda_norm times the norm term."""
        if self.options.lambda_norm is None:
            return jnp.zeros((), dtype)
        scores = shared.get("scores", self.wide.scores)
        term = terms.norm_term(core, scores, shared.get("relation", self.wide.relation))
        return self.hyper.lambda_norm.astype(dtype) * term.astype(dtype)

    def keep(self, core: Array, index: Array, dtype) -> Array:
        """lambda_keep times the keep term."""
        if self.options.lambda_keep is None:
            return jnp.zeros((), dtype)
        term = terms.keep_term(self.wide.middle, core, index, self.client.trained)
        return self.hyper.lambda_keep.astype(dtype) * term.astype(dtype)

    def drift(self, shared: Part, dtype) -> Array:
        """What a wrapper asks for the distance of the shared matrices from where they started."""
        if self.drift_fn is None:
            return jnp.zeros((), dtype)
        return self.drift_fn(shared["middle"], self.downloaded).astype(dtype)

    def distil(self, teacher: Array | None, metrics: Metrics, batch: Batch, dtype) -> Array:
        """lambda_distil times the distillation term."""
        if teacher is None:
            return jnp.zeros((), dtype)
        term = terms.distil_term(teacher, metrics, batch, self.options.distil_average)
        return self.hyper.lambda_distil.astype(dtype) * term.astype(dtype)

    def teacher(self, metrics: Metrics) -> Array | None:
        """Return the first half's logits, constant; None where nothing is distilled."""
        if self.options.lambda_distil is None:
            return None
        if "logits" not in metrics:
            raise FederationError(
                f"cohort {self.spec.name!r}: loss_fn's metrics have no 'logits', which distillation "
                "needs; return them, or build h2tune(lambda_distil=None)"
            )
        return jax.lax.stop_gradient(metrics["logits"])

    def step_shared(self, state: LocalState, grads: Part, index: Array, step, num_steps):
        """Move the shared part; entries that are not selected stay as downloaded."""
        keep: Part = dict.fromkeys(state.shared)
        now, touched = state.touched, state.touched
        if self.options.select_at == "step":
            now = self.entries(index)
            touched = touched | now
        if self.options.trains_copy:
            keep["middle"] = now
            if "relation" in state.shared:
                keep["relation"] = relation.support(self.client.relation)
        else:
            side = self.options.side(self.spec)
            ones = jnp.ones((*index.shape[:2], side, side), bool)
            keep["middle"] = triple.scatter(ones, index, self.size)
        rate = pace(self.hyper.shared_rate, self.options.schedule, step, num_steps)
        rates = dict.fromkeys(state.shared, rate)
        shared, opt = descend(
            self.options.transform, grads, state.shared_opt, state.shared, rates, keep=keep
        )
        return state._replace(shared=shared, shared_opt=opt, touched=touched)

    def step_own(self, state: LocalState, grads: Part, step, num_steps):
        """Move A, B and the head."""
        now = step, num_steps
        rate = pace(self.hyper.learning_rate, self.options.schedule, *now)
        rates = dict.fromkeys(state.own, rate)
        head_rate = self.spec.head_rate_factor * self.hyper.head_rate
        rates["head"] = pace(head_rate, self.options.schedule, *now)
        decay = dict.fromkeys(state.own, self.hyper.weight_decay)
        own, opt = descend(
            self.options.transform, grads, state.own_opt, state.own, rates, decay=decay
        )
        return state._replace(own=own, own_opt=opt)

    def seen(self, metrics: Metrics, **terms: Array) -> dict[str, Array]:
        """Gather what people look at."""
        return {**scalar_metrics(f"cohort {self.spec.name!r}", metrics), **terms}


def joint_step(
    here: LocalRound, state: LocalState, batch: Batch, key: Array, step: Array, num_steps: Array
) -> tuple[LocalState, dict[str, Array]]:
    """Train everything at once on task + norm: the warm start's step."""
    index = here.selection(state.shared)

    def objective(shared: Part, own: Part):
        loss, core, metrics = here.task(shared, own, index, batch, key)
        norm = here.norm(shared, core, loss.dtype)
        return loss + norm + here.drift(shared, loss.dtype), (loss, norm, metrics)

    gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
    (of_shared, of_own), (loss, norm, metrics) = gradient(state.shared, state.own)
    state = here.step_shared(state, of_shared, index, step, num_steps)
    state = here.step_own(state, of_own, step, num_steps)
    none = jnp.zeros_like(loss)
    return state, here.seen(metrics, loss=loss, norm=norm, keep=none, distil=none)


def alternating_step(
    here: LocalRound, state: LocalState, batch: Batch, key: Array, step: Array, num_steps: Array
) -> tuple[LocalState, dict[str, Array]]:
    """Train (G, P, S) on task + norm + keep, then A, B, head on task + distillation."""
    shared_key, own_key = jax.random.split(key)
    index = here.selection(state.shared)
    before = state

    def shared_objective(shared: Part):
        loss, core, metrics = here.task(shared, state.own, index, batch, shared_key)
        norm = here.norm(shared, core, loss.dtype)
        keep = here.keep(core, index, loss.dtype)
        total = loss + norm + keep + here.drift(shared, loss.dtype)
        return total, (loss, norm, keep, metrics)

    grads, (loss, norm, keep, metrics) = jax.grad(shared_objective, has_aux=True)(state.shared)
    teacher = here.teacher(metrics)
    state = here.step_shared(state, grads, index, step, num_steps)
    # gauss_seidel: the second half sees the first's step; jacobi: both stand at the same point.
    fixed = state.shared if here.options.alternation == "gauss_seidel" else before.shared

    def own_objective(own: Part):
        loss, _, metrics = here.task(fixed, own, index, batch, own_key)
        distil = here.distil(teacher, metrics, batch, loss.dtype)
        return loss + distil, distil

    grads, distil = jax.grad(own_objective, has_aux=True)(state.own)
    state = here.step_own(state, grads, step, num_steps)
    return state, here.seen(metrics, loss=loss, norm=norm, keep=keep, distil=distil)

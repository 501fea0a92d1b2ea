"""A federation of H2Tune in plain NumPy, float64, with its gradients written by hand.

Written from the specification alone, as slowly and literally as it reads: loops over clients and steps,
no stacking, no padding, no masks for what is not there. Readings of the specification that it leaves
to the reader stand where they are used, marked "Reading".
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from oracle import cores, model

Arrays = dict[tuple[str, ...], np.ndarray]
"""Parameters by path: ("a", kind), ("b", kind), ("head", name), ("middle",), ("relation",), ..."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The settings, by the names and with the defaults that the library has."""

    core: str = "residual"
    selection: str = "block"
    select_at: str = "download"
    train_factors: bool = True
    upload: str = "gradient"
    alternation: str = "gauss_seidel"
    warmup_rounds: int = 1
    average: str | None = None
    lambda_norm: float | None = 1.0
    lambda_keep: float | None = 1.0
    lambda_distil: float | None = 1.0
    distil_average: str = "positions"
    learning_rate: float = 1e-3
    shared_rate: float | None = None
    head_rate: float | None = None
    weight_decay: float = 0.0
    adam: tuple[float, float] | None = None  # (b1, b2); None: plain gradients
    optimizer_state: str = "restart"
    schedule: Callable[[int, int], float] | None = None

    def rate(self, path: tuple[str, ...]) -> float:
        """Return the learning rate of a parameter."""
        own = {"a": self.learning_rate, "b": self.learning_rate, "head": self.head_rate}
        rate = own.get(path[0], self.shared_rate)
        return self.learning_rate if rate is None else rate

    @property
    def trains_scores(self) -> bool:
        return self.selection in ("block", "score")

    @property
    def averages_selected(self) -> bool:
        average = self.average
        if average is None:
            average = "selected" if self.selection in ("block", "leading") else "all"
        return average == "selected"


class Cohort(NamedTuple):
    """What the clients of one architecture have in common."""

    kinds: tuple[str, ...]  # Ki of them
    places: tuple[int, ...]  # where these stand on G's axis K
    rank: int
    scale: float  # alpha / rank
    base: dict[str, np.ndarray]
    batch_size: int
    epochs: int


class Client(NamedTuple):
    """What one client keeps to itself."""

    a: dict[str, np.ndarray]  # by kind: [Li, D, r]
    b: dict[str, np.ndarray]  # by kind: [Li, r, F]
    head: dict[str, np.ndarray]
    relation: np.ndarray  # P [L, Li]
    scores: np.ndarray | None  # S [Li, Ki, R] (block) or [Li, Ki, R, R]
    active: np.ndarray  # [Li, Ki, r * r], flat places in the R x R matrix
    middle: np.ndarray  # [Li, Ki, R, R], M at the end of the last local training
    trained: bool
    optimizers: Any = None  # of the shared and the specific part, where they are kept


class Upload(NamedTuple):
    middle: np.ndarray  # [L, Ki, R, R]
    counts: np.ndarray  # bool[L, Ki, R, R]


# --- terms of the local objectives -----------------------------------------------------------------


def norm(x: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the Frobenius norm and its gradient, which is 0 at 0."""
    length = float(np.sqrt((x * x).sum()))
    return length, x / length if length > 0 else np.zeros_like(x)


def divergence(target: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return KL(softmax(target) || softmax(z)) over the last axis, and its gradient in z."""
    log_p, log_q = model.log_softmax(target), model.log_softmax(z)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1), np.exp(log_q) - np.exp(log_p)


def by_kind(cohort: Cohort, core: np.ndarray) -> dict[str, np.ndarray]:
    return {kind: core[:, k] for k, kind in enumerate(cohort.kinds)}


def part(params: Arrays, name: str) -> dict[str, np.ndarray]:
    return {path[1]: value for path, value in params.items() if path[0] == name}


def run_model(cohort: Cohort, options: Options, core: np.ndarray, own: Arrays, x: np.ndarray):
    """Run the client's model: -> (logits, pullback)."""
    return model.forward(
        cohort.base,
        part(own, "a"),
        by_kind(cohort, core),
        part(own, "b"),
        part(own, "head"),
        x,
        scale=cohort.scale,
        residual=options.core == "residual",
    )


def middle_of(options: Options, shared: Arrays) -> np.ndarray:
    """Return M: what the client trains (transpose), or made of its copy of G (gradient)."""
    if options.upload == "transpose":
        return shared["middle",]
    return cores.mix(shared["relation",], shared["middle",])


def straight_through(options: Options, d_core: np.ndarray, core: np.ndarray, index, size):
    """Return the gradient of the scores: dL/dT * M at the selected entries."""
    entries = cores.scatter(d_core * core, index, size)
    if options.selection == "block":
        # Reading: "summed over the row and column of the coordinate" is the sum over its row plus the
        # sum over its column; the diagonal entry stands in both.
        return entries.sum(axis=-1) + entries.sum(axis=-2)
    return entries


def shared_objective(
    cohort: Cohort,
    options: Options,
    shared: Arrays,
    own: Arrays,
    index: np.ndarray,
    last: np.ndarray | None,  # the cores of the last training at today's places; None: no term
    batch: dict[str, np.ndarray],
) -> tuple[float, float, Arrays, np.ndarray, model.Gradients]:
    """Return (objective, task, gradient of the shared part, logits, the task's other gradients).

    task + lambda_norm * mean of norms + lambda_keep * mean over sites of KL(last || now)
    """
    middle = middle_of(options, shared)
    core, size = cores.gather(middle, index), middle.shape[-1]
    logits, pullback = run_model(cohort, options, core, own, batch["x"])
    task, d_logits = model.cross_entropy(logits, batch)
    task_grads = pullback(d_logits)
    d_core = np.stack([task_grads.core[kind] for kind in cohort.kinds], axis=1)
    objective, sites = task, list(np.ndindex(*core.shape[:2]))

    # Reading: one number a site for T, one a site for S where the client holds scores (frozen ones
    # included), and one for P (even where P is fixed); the plain mean over all these numbers.
    scores, relation = shared["scores",], shared["relation",]
    weight = (options.lambda_norm or 0.0) / (len(sites) * (1 if scores is None else 2) + 1)
    d_scores = None if scores is None else np.zeros_like(scores)
    d_core = d_core.copy()
    for site in sites:
        length, slope = norm(core[site])
        objective += weight * length
        d_core[site] += weight * slope
        if scores is not None:
            length, slope = norm(scores[site])
            objective += weight * length
            d_scores[site] += weight * slope
    length, slope = norm(relation)
    objective += weight * length
    d_relation = weight * slope

    if last is not None:
        weight = (options.lambda_keep or 0.0) / len(sites)
        for site in sites:
            kl, slope = divergence(last[site].ravel(), core[site].ravel())
            objective += weight * float(kl)
            d_core[site] += weight * slope.reshape(core[site].shape)

    # Reading: the straight-through rule takes the gradient of the whole objective in T.
    if options.trains_scores:
        d_scores += straight_through(options, d_core, core, index, size)
    d_middle = cores.scatter(d_core, index, size)
    if options.upload == "gradient":
        d_relation = d_relation + np.einsum("jkab,lkab->jl", shared["middle",], d_middle)
        d_middle = cores.unmix(relation, d_middle)
    grads = {("middle",): d_middle, ("relation",): d_relation, ("scores",): d_scores}
    return objective, task, grads, logits, task_grads


def own_gradients(options: Options, grads: model.Gradients) -> Arrays:
    """Name the gradients of A, B and the head by their paths."""
    factors = {("a", kind): g for kind, g in grads.a.items()}
    factors |= {("b", kind): g for kind, g in grads.b.items()}
    if not options.train_factors:
        factors = {}
    return factors | {("head", name): g for name, g in grads.head.items()}


def own_objective(
    cohort: Cohort,
    options: Options,
    shared: Arrays,
    own: Arrays,
    index: np.ndarray,
    logits_1: np.ndarray,
    batch: dict[str, np.ndarray],
) -> tuple[float, float, Arrays]:
    """Return (objective, task, gradient): task + lambda_distil * KL(logits of half 1 || now)."""
    core = cores.gather(middle_of(options, shared), index)
    logits, pullback = run_model(cohort, options, core, own, batch["x"])
    task, d_logits = model.cross_entropy(logits, batch)
    counted = model.counted_positions(batch)
    # The mean over the counted positions; or their sum, divided by the number of examples.
    divisor = len(counted) if options.distil_average == "batch" else max(counted.sum(), 1)
    weight = (options.lambda_distil or 0.0) / divisor
    kl, slope = divergence(logits_1, logits)
    objective = task + weight * float(kl[counted].sum())
    d_logits = d_logits + weight * np.where(counted[..., None], slope, 0.0)
    return objective, task, own_gradients(options, pullback(d_logits))


# --- optimiser -------------------------------------------------------------------------------------


class Optimizer:
    """Plain gradients, or Adam with bias correction: what a step subtracts, before the rate."""

    eps = 1e-8

    def __init__(self, options: Options):
        self.adam, self.count, self.first, self.second = options.adam, 0, {}, {}

    def directions(self, grads: Arrays) -> Arrays:
        if not self.adam:
            return grads
        self.count += 1
        (b1, b2), out = self.adam, {}
        for path, g in grads.items():
            self.first[path] = b1 * self.first.get(path, 0.0) + (1 - b1) * g
            self.second[path] = b2 * self.second.get(path, 0.0) + (1 - b2) * g * g
            first = self.first[path] / (1 - b1**self.count)
            second = self.second[path] / (1 - b2**self.count)
            out[path] = first / (np.sqrt(second) + self.eps)
        return out


def step_shared(options, shared: Arrays, grads: Arrays, optimizer, free: Arrays, factor) -> Arrays:
    """Step the shared part where it is free to move; it knows no weight decay."""
    trained = {path: g for path, g in grads.items() if path in free}
    after = dict(shared)
    for path, direction in optimizer.directions(trained).items():
        rate = factor * options.rate(path)
        after[path] = np.where(free[path], shared[path] - rate * direction, shared[path])
    return after


def step_own(options, own: Arrays, grads: Arrays, optimizer, factor) -> Arrays:
    """Step A, B and the head, with decoupled weight decay."""
    after = dict(own)
    for path, direction in optimizer.directions(grads).items():
        rate = factor * options.rate(path)
        after[path] = own[path] - rate * (direction + options.weight_decay * own[path])
    return after


# --- a round ---------------------------------------------------------------------------------------


def batches(cohort: Cohort, examples: dict[str, np.ndarray], num_examples: int):
    """Yield a client's batches in order; the last of an epoch may be smaller."""
    for _ in range(cohort.epochs):
        for start in range(0, num_examples, cohort.batch_size):
            stop = min(start + cohort.batch_size, num_examples)
            yield {name: rows[start:stop] for name, rows in examples.items()}


def train(
    cohort: Cohort,
    options: Options,
    client: Client,
    downloaded: np.ndarray,  # G of the cohort's kinds [L, Ki, R, R]
    examples: dict[str, np.ndarray],
    num_examples: int,
    round_index: int,
) -> tuple[Client, Upload, float]:
    """Train one client for a round: -> (its next state, its upload, sum of its task losses)."""
    gradient = options.upload == "gradient"
    support = client.relation != 0
    size = downloaded.shape[-1]
    middle = cores.mix(client.relation, downloaded)
    index = cores.select(options.selection, cohort.rank, middle, client.scores, client.active)

    shared: Arrays = {
        ("middle",): downloaded if gradient else middle,
        ("relation",): client.relation,
        ("scores",): client.scores,
    }
    own: Arrays = {("a", kind): value for kind, value in client.a.items()}
    own |= {("b", kind): value for kind, value in client.b.items()}
    own |= {("head", name): value for name, value in client.head.items()}

    joint = options.alternation == "joint" or round_index < options.warmup_rounds
    kept = options.optimizer_state == "kept"
    optimizers = copy.deepcopy(client.optimizers) if kept else None
    shared_optimizer, own_optimizer = optimizers or (Optimizer(options), Optimizer(options))
    ever = np.zeros(middle.shape, bool)
    losses = 0.0
    work = list(batches(cohort, examples, num_examples))
    for step, batch in enumerate(work):
        factor = 1.0 if options.schedule is None else options.schedule(step, len(work))
        if options.select_at == "step":
            # Reading: once a step, before its first half; both halves use the same places.
            now = middle_of(options, shared)
            index = cores.select(
                options.selection, cohort.rank, now, shared["scores",], client.active
            )
        entries = cores.selected_entries(index, size)
        ever |= entries

        # What may move: selected entries; P on its initial support, unless it is fixed; S as a whole
        # (Reading: its norm is over all of S), unless it is frozen or absent.
        free: Arrays = {("middle",): cores.reach(support, entries) if gradient else entries}
        if gradient:
            free["relation",] = support
        if options.trains_scores:
            free["scores",] = np.ones(client.scores.shape, bool)

        # A joint step knows neither keep nor distillation. No T_last before a first participation.
        last = None if joint or not client.trained else cores.gather(client.middle, index)
        _, task, shared_grads, logits_1, task_grads = shared_objective(
            cohort, options, shared, own, index, last, batch
        )
        losses += task
        moved = step_shared(options, shared, shared_grads, shared_optimizer, free, factor)
        if joint:
            own_grads = own_gradients(options, task_grads)
        else:
            seen = moved if options.alternation == "gauss_seidel" else shared
            _, _, own_grads = own_objective(cohort, options, seen, own, index, logits_1, batch)
        own = step_own(options, own, own_grads, own_optimizer, factor)
        shared = moved

    middle = middle_of(options, shared)
    if options.select_at == "step":
        # Reading: the client is left with the places that its last parameters choose, as its next
        # forward pass would. Nothing in training depends on it.
        index = cores.select(
            options.selection, cohort.rank, middle, shared["scores",], client.active
        )
    after = Client(
        a=part(own, "a"),
        b=part(own, "b"),
        head=part(own, "head"),
        relation=shared["relation",],
        scores=shared["scores",],
        active=index,
        middle=middle,
        trained=True,
        optimizers=(shared_optimizer, own_optimizer) if kept else None,
    )
    sent = shared["middle",] if gradient else cores.unmix(client.relation, middle)
    # A slot without support counts nowhere. Reading: "selected" means selected by a layer that the
    # slot speaks to, at any step of the round.
    slots = np.broadcast_to(support.any(axis=1)[:, None, None, None], sent.shape)
    counts = cores.reach(support, ever) if options.averages_selected else slots
    return after, Upload(sent, counts), losses


def is_finite(client: Client, upload: Upload, losses: float) -> bool:
    trees = [client.a, client.b, client.head]
    arrays = [x for tree in trees for x in tree.values()] + [client.relation, client.middle]
    arrays += [upload.middle] + ([] if client.scores is None else [client.scores])
    return bool(np.isfinite(losses)) and all(np.isfinite(x).all() for x in arrays)


def run_round(
    cohorts: tuple[Cohort, ...],
    options: Options,
    shared: np.ndarray,  # G [L, K, R, R]
    clients: tuple[tuple[Client, ...], ...],  # by cohort
    data: tuple[tuple[tuple[dict[str, np.ndarray], int], ...], ...],  # by cohort and client
    client_ids: tuple[tuple[int, ...], ...],
    weights: tuple[tuple[float, ...], ...],
    round_index: int,
) -> tuple[np.ndarray, tuple[tuple[Client, ...], ...]]:
    """Run one round: -> (next G, next clients)."""
    total, count = np.zeros_like(shared), np.zeros_like(shared)
    after = [list(cohort) for cohort in clients]
    for c, cohort in enumerate(cohorts):
        for i, weight in zip(client_ids[c], weights[c]):
            examples, num_examples = data[c][i]
            downloaded = shared[:, list(cohort.places)]
            client, upload, losses = train(
                cohort, options, clients[c][i], downloaded, examples, num_examples, round_index
            )
            if not is_finite(client, upload, losses):
                continue  # neither the server nor the client notices
            after[c][i] = client
            for k, place in enumerate(cohort.places):
                share = weight * upload.counts[:, k]
                total[:, place] += share * upload.middle[:, k]
                count[:, place] += share
    mean = np.divide(total, count, out=shared.copy(), where=count > 0)
    return mean, tuple(tuple(cohort) for cohort in after)

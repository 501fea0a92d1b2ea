"""What a report reads of a run folder. Needs no model, no data and no device."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax.run.disk import RunError, is_there, reading
from h2tune_jax.run.folder import RunFolder, holds_run, is_live, read_facts
from h2tune_jax.run.paired import Score
from h2tune_jax.run.records import read_log
from h2tune_jax.types import FederationError

MOMENT_TITLES = {
    "trained": "after local training",
    "downloaded": "right after download",
    "newcomers": "newcomers, after their stated number of steps",
}
TASK_METRICS = ("accuracy", "token_accuracy", "mae")
"""Metrics that stand for a task, the first that there is; else its loss."""


class GroupView(NamedTuple):
    """One client group."""

    name: str
    task: str
    rank: int
    clients: tuple[str, ...]
    majority: float | None  # share of the most frequent class in the test data, where that is known

    def client_name(self, client: int) -> str:
        """Return a client's name."""
        return self.clients[client] if client < len(self.clients) else f"{self.name}/{client}"


class RunView(NamedTuple):
    """One run, as its folder tells it."""

    folder: Path
    label: str  # unique in the report
    method: str
    seed: int
    name: str
    config: Mapping[str, Any]
    config_text: str
    info: Mapping[str, Any]  # run.json
    groups: tuple[GroupView, ...]
    records: list[dict]  # metrics.jsonl
    timings: list[dict]  # timings.jsonl
    damage: str  # what of these two cannot be read; "" for nothing
    is_live: bool  # a process writes it: this is what it holds so far


def read_views(folders: Sequence[str | Path]) -> tuple[RunView, ...]:
    """Read run folders and give each a label of its own: its method, and what else tells them apart."""
    views = [read_view(folder) for folder in folders]
    for label_of in (
        lambda v: v.method,
        lambda v: f"{v.method}, seed {v.seed}",
        lambda v: f"{v.name}, {v.method}, seed {v.seed}",
        lambda v: str(v.folder),
    ):
        labels = [label_of(view) for view in views]
        if len(set(labels)) == len(labels):
            break
    return tuple(view._replace(label=label) for view, label in zip(views, labels))


def read_view(folder: str | Path) -> RunView:
    """Read one run folder, also of a run that is still being written."""
    paths = RunFolder(Path(folder))
    with reading("the run's config", paths.config):
        text = paths.config.read_bytes() if is_there(paths.config) else None
    if text is None:
        raise FederationError(f"{folder} is not a run folder: it holds no config.toml")
    try:
        config = tomllib.loads(text.decode())
    except ValueError as error:
        raise RunError(f"{paths.config} cannot be read: {error}") from error
    info = read_facts(paths) if holds_run(paths.path) else {}
    method = str(config.get("method", {}).get("name", "unknown"))
    live = is_live(paths)
    records, damage = read_log(paths.metrics)
    timings, slow = read_log(paths.timings)
    return RunView(
        folder=paths.path,
        label=method,
        method=method,
        seed=int(config.get("seed", 0)),
        name=str(config.get("name", "run")),
        config=config,
        config_text=text.decode(),
        info=info,
        groups=_groups(config, info),
        records=records,
        timings=timings,
        damage="; ".join(filter(None, (damage, slow))),
        is_live=live,
    )


def _groups(config: Mapping[str, Any], info: Mapping[str, Any]) -> tuple[GroupView, ...]:
    facts = {entry.get("name"): entry for entry in info.get("groups", ())}
    groups = []
    for entry in config.get("groups", ()):
        name, known = str(entry["name"]), facts.get(entry["name"], {})
        count = int(entry.get("count", 1))
        task = entry.get("task", {})
        groups.append(
            GroupView(
                name=name,
                # A file's folder says nothing of the task.
                task=Path(str(known.get("task") or task.get("data", name))).name,
                rank=int(entry.get("rank", 0)),
                clients=tuple(f"{name}/{i}" for i in range(count)),
                majority=known.get("majority"),
            )
        )
    return tuple(groups)


def metric_of(view: RunView, group: str) -> str | None:
    """Name the metric that stands for a group's task; None where it was never evaluated."""
    for record in view.records:
        for cohorts in record.get("evaluation", {}).values():
            seen = cohorts.get(group)
            if seen:
                wanted = view.config.get("checkpoints", {}).get("metric", "accuracy")
                return next((m for m in (*TASK_METRICS, wanted) if m in seen), "loss")
    return None


def main_moment(view: RunView) -> str:
    """Name the moment that stands for a run: the first that its config evaluates at."""
    moments = view.config.get("evaluation", {}).get("moments", ())
    return moments[0] if moments else "trained"


def moments_of(views: Iterable[RunView]) -> tuple[str, ...]:
    """List the moments that any run was evaluated at, in their usual order."""
    seen = {moment for v in views for r in v.records for moment in r.get("evaluation", {})}
    return (*(m for m in MOMENT_TITLES if m in seen), *sorted(seen - set(MOMENT_TITLES)))


class Curve(NamedTuple):
    """A metric of clients over rounds."""

    rounds: np.ndarray  # i[T], rounds that were done; 0 is before training
    values: np.ndarray  # f64[T, N]; NaN where a client was not evaluated
    clients: np.ndarray  # i[N], ids of the clients that were evaluated at all

    @property
    def mean(self) -> np.ndarray:  # f64[T]
        """The mean over the clients that were evaluated."""
        known = np.isfinite(self.values)
        total = np.where(known, self.values, 0.0).sum(axis=1)
        count = known.sum(axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def curve(view: RunView, group: str, metric: str, moment: str) -> Curve:
    """Read a metric of a group's clients, as evaluated at a moment."""
    rounds, rows = [], []
    for record in view.records:
        own = record.get("evaluation", {}).get(moment, {}).get(group, {})
        if own.get(metric):
            rounds.append(record["round"] + 1)
            ids = own.get("clients", range(len(own[metric])))
            rows.append((np.asarray(ids, np.int64), numbers(own[metric])))
    clients = np.unique(np.concatenate([ids for ids, _ in rows])) if rows else np.zeros(0, np.int64)
    values = np.full((len(rows), len(clients)), np.nan)
    for place, (ids, row) in enumerate(rows):
        values[place, np.searchsorted(clients, ids)] = row
    return Curve(np.asarray(rounds, np.int64), values, clients)


def training_mean(view: RunView, group: str, metric: str) -> Curve:
    """Read the mean of a training metric over a round's participants: [T, 1]."""
    rounds, means = [], []
    for record in view.records:
        values = record.get("cohorts", {}).get(group, {}).get(metric)
        if values:
            known = numbers(values)
            known = known[np.isfinite(known)]
            rounds.append(record["round"] + 1)
            means.append(known.mean() if len(known) else np.nan)
    return single(rounds, means)


def single(rounds: Sequence[int], values: Sequence[float]) -> Curve:
    """Make a curve of one value a round."""
    column = np.asarray(values, np.float64).reshape(-1, 1)
    return Curve(np.asarray(rounds, np.int64), column, np.zeros(1, np.int64))


def numbers(values: Iterable[Any]) -> np.ndarray:
    """Turn JSON numbers into floats; what is null becomes NaN."""
    return np.asarray([np.nan if v is None else float(v) for v in values], np.float64)


def final_score(view: RunView) -> Score:
    """Summarise what a run ended with: its last evaluation, as a mean over each group's clients."""
    moment = main_moment(view)
    values = {}
    for group in view.groups:
        metric = metric_of(view, group.name)
        if metric is not None:
            found = curve(view, group.name, metric, moment)
            if len(found.rounds) and np.isfinite(found.mean[-1]):
                values[group.name] = metric, float(found.mean[-1])
    return Score(view.method, view.seed, values)

"""What is in a run's folder, and which of its checkpoints can be trusted."""

import fcntl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from h2tune_jax.run import checkpoint, numbers
from h2tune_jax.run.folder import RunFolder, read_facts
from h2tune_jax.run.report.view import (
    GroupView,
    RunView,
    curve,
    main_moment,
    metric_of,
    read_view,
)


class CheckpointLine(NamedTuple):
    """One checkpoint."""

    rounds: int
    verifies: bool
    reason: str  # why it does not
    size: int  # bytes


class GroupLine(NamedTuple):
    """One group, as the last evaluation found it."""

    name: str
    task: str
    clients: int
    metric: str | None
    value: float | None


class Inspection(NamedTuple):
    """What a run's folder holds."""

    folder: Path
    name: str
    method: str
    seed: int
    rounds: int  # recorded
    planned: int
    is_running: bool  # a process holds the lock
    groups: tuple[GroupLine, ...]
    checkpoints: tuple[CheckpointLine, ...]  # oldest first
    sizes: Mapping[str, int]  # bytes of each entry of the folder
    facts: Mapping[str, Any]  # run.json


def inspect_run(folder: str | Path) -> Inspection:
    """Read a run's folder, and check every checkpoint against its digests. Changes nothing."""
    paths = RunFolder(Path(folder))
    facts = read_facts(paths)
    view = read_view(folder)
    sizes = {entry.name: _size(entry) for entry in sorted(paths.path.iterdir())}
    lines = tuple(
        CheckpointLine(step, ok, reason, _size(paths.checkpoints / f"{step:06d}"))
        for step, ok, reason in checkpoint.verify(paths)
    )
    return Inspection(
        folder=paths.path,
        name=view.name,
        method=view.method,
        seed=view.seed,
        rounds=max((record["round"] + 1 for record in view.records), default=0),
        planned=int(view.config.get("rounds", 0)),
        is_running=is_locked(paths),
        groups=tuple(_group_line(view, group) for group in view.groups),
        checkpoints=lines,
        sizes=sizes,
        facts=facts,
    )


def _group_line(view: RunView, group: GroupView) -> GroupLine:
    metric, value = metric_of(view, group.name), None
    if metric is not None:
        found = curve(view, group.name, metric, main_moment(view))
        value = float(found.mean[-1]) if len(found.rounds) else None
    return GroupLine(group.name, group.task, len(group.clients), metric, value)


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def is_locked(folder: RunFolder) -> bool:
    """Say whether a process writes this run."""
    # A holder says who it is; only then is the lock tried, which a writer that just starts could mind.
    if not folder.lock.is_file() or not folder.lock.read_bytes():
        return False
    with folder.lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def inspection_view(found: Inspection) -> RenderableType:
    """Draw an inspection for a terminal."""
    state = "running" if found.is_running else "not running"
    head = Text.assemble(
        (found.name, "bold"), f"  {found.method}, seed {found.seed}\n",
        f"{found.rounds} of {found.planned} rounds recorded, {state}",
    )  # fmt: skip
    groups = _columns("group", "task", "clients", "last evaluation")
    for group in found.groups:
        value = "none" if group.metric is None or group.value is None else (
            f"{group.metric} {numbers.value_of(group.metric, group.value)}"
        )  # fmt: skip
        groups.add_row(Text(group.name), Text(group.task), f"{group.clients:,}", value)
    saved = _columns("checkpoint of round", "size", "verifies")
    for line in found.checkpoints:
        verdict = Text("yes", "green") if line.verifies else Text(f"no: {line.reason}", "red")
        saved.add_row(str(line.rounds), numbers.size(line.size), verdict)
    files = _columns("file", "size")
    for name, size in found.sizes.items():
        files.add_row(Text(name), numbers.size(size))
    facts = _columns("", "")
    for name in ("device", "commit", "config_digest"):
        if found.facts.get(name) is not None:
            facts.add_row(name, Text(str(found.facts[name])))
    for name, version in found.facts.get("versions", {}).items():
        facts.add_row(name, Text(str(version)))
    space = Text("")
    saved = saved if found.checkpoints else Text("no checkpoints")
    return Group(head, space, groups, space, saved, space, files, space, facts)


def _columns(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_header=any(names))
    for name in names:
        table.add_column(name, justify="right" if name in ("clients", "size") else "left")
    return table

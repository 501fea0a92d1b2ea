"""What is in a run's folder, and which of its checkpoints can be trusted."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from h2tune_jax.run import checkpoint, numbers
from h2tune_jax.run.disk import names_in
from h2tune_jax.run.folder import RunFolder, read_facts
from h2tune_jax.run.notices import read_notices
from h2tune_jax.run.report.view import (
    GroupView,
    RunView,
    curve,
    main_moment,
    metric_of,
    read_view,
)

MOST_NOTICES = 20


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
    set_aside: Mapping[
        str, int
    ]  # bytes of each checkpoint that did not verify when the run was resumed
    notices: tuple[Mapping[str, Any], ...]  # lines of notices.jsonl, oldest first
    damage: str  # of metrics.jsonl or timings.jsonl; "" for none
    sizes: Mapping[str, int]  # bytes of each entry of the folder
    facts: Mapping[str, Any]  # run.json


def inspect_run(folder: str | Path) -> Inspection:
    """Read a run's folder, and check every checkpoint against its digests. Changes nothing."""
    paths = RunFolder(Path(folder))
    facts = read_facts(paths)
    view = read_view(folder)
    lines = [
        CheckpointLine(step, ok, reason, _size(checkpoint.checkpoint_path(paths, step)))
        for step, ok, reason in checkpoint.verify(paths)
    ]
    there = checkpoint.steps(paths)  # a run under way deletes what it has newer ones for
    return Inspection(
        folder=paths.path,
        name=view.name,
        method=view.method,
        seed=view.seed,
        rounds=max((record["round"] + 1 for record in view.records), default=0),
        planned=int(view.config.get("rounds", 0)),
        is_running=view.is_live,
        groups=tuple(_group_line(view, group) for group in view.groups),
        checkpoints=tuple(line for line in lines if line.rounds in there),
        set_aside={name: _size(paths.checkpoints / name) for name in checkpoint.broken(paths)},
        notices=tuple(read_notices(paths)),
        damage=view.damage,
        sizes={name: _size(paths.path / name) for name in names_in(paths.path)},
        facts=facts,
    )


def _group_line(view: RunView, group: GroupView) -> GroupLine:
    metric, value = metric_of(view, group.name), None
    if metric is not None:
        found = curve(view, group.name, metric, main_moment(view))
        value = float(found.mean[-1]) if len(found.rounds) else None
    return GroupLine(group.name, group.task, len(group.clients), metric, value)


def _size(path: Path) -> int:
    """Count bytes; what a run under way deletes meanwhile counts nothing."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(_size(entry) for entry in path.iterdir())
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def inspection_view(found: Inspection) -> RenderableType:
    """Draw an inspection for a terminal."""
    state = "not running"
    if found.is_running:
        state = "running: this is what it holds so far"
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
    for name, size in found.set_aside.items():
        saved.add_row(
            Text(name), numbers.size(size), Text("no: set aside when the run was resumed", "red")
        )
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
    saved = saved if found.checkpoints or found.set_aside else Text("no checkpoints")
    parts = [
        head,
        *([Text(found.damage, "red")] if found.damage else []),
        space,
        groups,
        space,
        saved,
    ]
    return Group(*parts, space, *_notices_view(found), files, space, facts)


def _notices_view(found: Inspection) -> list[RenderableType]:
    """Draw the last notices, if there are any."""
    if not found.notices:
        return []
    last = found.notices[-MOST_NOTICES:]
    table = _columns("when", f"last {len(last)} of {len(found.notices)} notices")
    for line in last:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.get("wall", 0)))
        style = "yellow" if line.get("level") == "warning" else ""
        table.add_row(when, Text(str(line["text"]), style))
    return [table, Text("")]


def _columns(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_header=any(names))
    for name in names:
        table.add_column(name, justify="right" if name in ("clients", "size") else "left")
    return table

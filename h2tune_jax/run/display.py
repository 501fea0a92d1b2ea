"""What the terminal shows of a run: a live table, or plain lines where there is no terminal.

    with Display() as display:
        simulate(config, observers=(display,))

What is shown is a pure function of what was told (`follow`, `table`, `line`); only `Display` writes.
"""

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from h2tune_jax.run import numbers
from h2tune_jax.run.events import Event, Finished, Notice, RoundDone, Saved, Started
from h2tune_jax.run.report.view import TASK_METRICS

INTERVAL = 0.25
"""Seconds between two refreshes, at least."""

MOST_GROUPS = 12
_MISSING = "-"
_RECENT = 10


class GroupLine(NamedTuple):
    """The latest of one group."""

    name: str
    clients: int = 0  # that took part in the last round
    loss: float | None = None  # of their training
    metric: str = ""
    value: float | None = None  # at the last evaluation
    rejected: int = 0  # so far


class Seen(NamedTuple):
    """What is known of a run so far."""

    name: str = "run"
    method: str = ""
    total: int = 0
    done: int = 0
    groups: tuple[GroupLine, ...] = ()
    seconds: tuple[float, ...] = ()  # of the last rounds
    spent: float = 0.0  # seconds of all rounds since the start
    clients_per_second: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    saved: int | None = None  # rounds that the last checkpoint holds
    reason: str = ""  # why it is over
    folder: Path | None = None


def follow(seen: Seen, event: Event) -> Seen:
    """Take in one event."""
    if isinstance(event, Started):
        names = [group.name for group in event.config.groups]
        return Seen(
            name=event.config.name,
            method=event.config.method.name,
            total=event.total_rounds,
            done=event.first_round,
            groups=tuple(map(GroupLine, names)),
            folder=event.folder,
        )
    if isinstance(event, RoundDone):
        return _follow_round(seen, event.record, event.timing)
    if isinstance(event, Saved):
        return seen._replace(saved=event.round)
    if isinstance(event, Finished):
        return seen._replace(reason=event.reason, done=event.rounds, folder=event.folder)
    return seen


def _follow_round(seen: Seen, record: Mapping[str, Any], timing: Mapping[str, Any]) -> Seen:
    # What comes before training is an evaluation alone.
    trained = record["round"] >= 0
    groups = tuple(_follow_group(group, record) for group in seen.groups)
    seconds = timing.get("seconds") if trained else None
    recent = seen.seconds if seconds is None else (*seen.seconds, seconds)[-_RECENT:]
    return seen._replace(
        groups=groups,
        done=record["round"] + 1,
        seconds=recent,
        spent=seen.spent + (seconds or 0.0),
        clients_per_second=timing.get("clients_per_second", seen.clients_per_second),
        bytes_up=seen.bytes_up + (record.get("bytes_up") or 0),
        bytes_down=seen.bytes_down + (record.get("bytes_down") or 0),
    )


def _follow_group(group: GroupLine, record: Mapping[str, Any]) -> GroupLine:
    cohort = record.get("cohorts", {}).get(group.name, {})
    if cohort.get("clients"):
        group = group._replace(
            clients=len(cohort["clients"]),
            loss=_mean(cohort.get("loss")),
            rejected=group.rejected + int(cohort.get("rejected", 0)),
        )
    for moment in record.get("evaluation", {}).values():
        if own := moment.get(group.name):
            metric = next((m for m in TASK_METRICS if m in own), "loss")
            return group._replace(metric=metric, value=_mean(own.get(metric)))
    return group


def _mean(values: Any) -> float | None:
    known = [value for value in values or () if value is not None and np.isfinite(value)]
    return float(np.mean(known)) if known else None


def time_left(seen: Seen) -> float | None:
    """Estimate the seconds that are left from the median of the last rounds."""
    if not seen.seconds:
        return None
    # The first round compiles, which the others do not.
    usual = seen.seconds[1:] if 1 < len(seen.seconds) < _RECENT else seen.seconds
    return float(np.median(usual)) * max(seen.total - seen.done, 0)


def line(seen: Seen) -> str:
    """Write the state of a run in one plain line."""
    parts = [f"round {seen.done}/{seen.total}"]
    for group in seen.groups[:MOST_GROUPS]:
        text = f"{group.name} loss {_number(group.loss)}"
        if group.value is not None:
            text += f" {group.metric} {_value(group)}"
        parts.append(text + (f" rejected {group.rejected}" if group.rejected else ""))
    if len(seen.groups) > MOST_GROUPS:
        parts.append(f"{len(seen.groups) - MOST_GROUPS} more groups")
    parts.append(f"{_number(seen.clients_per_second)} clients/s")
    parts.append(f"up {numbers.size(seen.bytes_up)} down {numbers.size(seen.bytes_down)}")
    if (left := time_left(seen)) is not None and seen.done < seen.total:
        parts.append(f"{numbers.duration(left)} left")
    return " | ".join(parts)


def ending(seen: Seen) -> str:
    """Write how a run ended in one line."""
    rounds = f"{seen.done} of {seen.total} rounds"
    where = "" if seen.folder is None else f"; results in {seen.folder}"
    return f"{seen.reason}: {rounds}, {numbers.duration(seen.spent)}{where}"


def table(seen: Seen) -> RenderableType:
    """Draw the state of a run."""
    head = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(seen.total, 1), completed=seen.done, width=24)
    title = Text.assemble((seen.name, "bold"), " ", (seen.method, "cyan"))
    head.add_row(title, Text(f"round {seen.done}/{seen.total}"), bar)

    body = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    # Where there is little room, it is the names that are cut.
    body.add_column("group", overflow="ellipsis", max_width=24)
    body.add_column("clients", justify="right", no_wrap=True)
    body.add_column("loss", justify="right", no_wrap=True, min_width=6)
    body.add_column("evaluated", no_wrap=True, min_width=15)
    for group in seen.groups[:MOST_GROUPS]:
        found = f"{group.metric} {_value(group)}" if group.metric else _MISSING
        body.add_row(escape(group.name), str(group.clients or _MISSING), _number(group.loss), found)
    more = len(seen.groups) - MOST_GROUPS
    rest = [Text(f"{more} more groups", style="dim")] if more > 0 else []
    rest += [
        Text(f"{group.name}: results rejected as not finite: {group.rejected}", style="red")
        for group in seen.groups[:MOST_GROUPS]
        if group.rejected
    ]

    speed = f"{_number(seen.clients_per_second)} clients/s"
    sent = f"sent up {numbers.size(seen.bytes_up)}, down {numbers.size(seen.bytes_down)}"
    left = time_left(seen)
    times = f"{numbers.duration(seen.spent)} so far"
    if left is not None and seen.done < seen.total:
        times += f", {numbers.duration(left)} left"
    if seen.saved is not None:
        times += f"   saved at round {seen.saved}"
    facts = Text(f"{speed}   {sent}\n{times}", style="dim")
    return Group(head, Text(""), body, *rest, Text(""), facts)


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.3g}"


def _value(group: GroupLine) -> str:
    if group.value is None:
        return _MISSING
    return numbers.value_of(group.metric, group.value)


class Display:
    """An observer that writes to a terminal. Whatever happens to the terminal, the run goes on.

    A live table where the console is a terminal; plain lines where it is not, with NO_COLOR, and in
    notebooks. Written at most four times a second; the last state always.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Write to `console` (None: standard output); `live` overrides what its kind asks for."""
        self.console = Console() if console is None else console
        if live is None:
            plain = "NO_COLOR" in os.environ or self.console.is_dumb_terminal
            live = self.console.is_terminal and not self.console.is_jupyter and not plain
        self._live_wanted, self._clock = live, clock
        self._live: Live | None = None
        self._seen, self._broken = Seen(), False
        self._last, self._printed = -float("inf"), 0

    @property
    def shows_notices(self) -> bool:
        """Whether what is told is seen; see `run.notices`."""
        return not self._broken

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Show an event. Raises nothing."""
        if self._broken:
            return
        try:
            self._show(event)
        except Exception as error:
            self._broken = True
            self.close()
            with contextlib.suppress(Exception):
                print(f"The display stopped, the run goes on: {error!r}", file=sys.stderr)

    def close(self) -> None:
        """Give the terminal back as it was. May be called again."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(Exception):
                live.stop()
        atexit.unregister(self.close)

    def _show(self, event: Event) -> None:
        self._seen = follow(self._seen, event)
        if isinstance(event, Started):
            self.close()
            self._last, self._printed = -float("inf"), self._seen.done
            if self._live_wanted:
                # Refreshed by events alone: a thread that redraws would cost while nothing changes.
                self._live = Live(
                    table(self._seen), console=self.console, auto_refresh=False, transient=False
                )
                self._live.start(refresh=True)
                # A run that raises never says Finished.
                atexit.register(self.close)
            else:
                self._print(f"{self._seen.name}: {self._seen.method}, {self._seen.total} rounds")
        elif isinstance(event, Notice):
            mark = "warning: " if event.level == "warning" else ""
            style = "yellow" if event.level == "warning" else None
            self._print(mark + event.text, style)
        elif isinstance(event, Finished):
            self._refresh(whole=True)
            self.close()
            self._print(ending(self._seen))
        elif isinstance(event, RoundDone):
            self._refresh(whole=self._seen.done >= self._seen.total)
        elif self._live is not None:
            self._refresh(whole=False)

    def _refresh(self, *, whole: bool) -> None:
        now = self._clock()
        if now - self._last < INTERVAL and not whole:
            return
        if self._live is not None:
            self._last = now
            self._live.update(table(self._seen), refresh=True)
        elif self._seen.done != self._printed:
            self._last, self._printed = now, self._seen.done
            self._print(line(self._seen))

    def _print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

"""Where a traced round's time goes: the profiler's events, summed by operation.

`jax.profiler.trace` leaves a `*.trace.json.gz` that Perfetto opens, and a `*.xplane.pb` for XProf. This
reads the first and sums every operation's own time, without that of what it calls, over all threads.
"""

import collections
import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = "program.txt"  # the compiled program's text, beside the trace

# What only waits for others, in XLA's own words.
_WAITING = ("wait for completion", "end: ")
_OPERATION = re.compile(r"%?([\w.-]+) = .*?metadata=\{[^}]*?op_name=\"([^\"]*)\"")


class Spent(NamedTuple):
    """One operation's part of a trace."""

    operation: str  # as the compiled program names it
    seconds: float  # its own, over all calls and threads
    share: float
    calls: int
    where: str  # the path of functions in the source that it comes from


def find(folder: Path) -> Path:
    """Return the newest trace below a folder."""
    files = sorted(folder.rglob("*.trace.json.gz"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder}: no *.trace.json.gz below it")
    return files[-1]


def read(file: Path) -> list[dict[str, Any]]:
    """Read a trace's events."""
    with gzip.open(file) as stream:
        return json.load(stream)["traceEvents"]


def sources(program_text: str) -> dict[str, str]:
    """Map the operations of a compiled program's text to where they come from."""
    return {name: _shorten(path) for name, path in _OPERATION.findall(program_text)}


def _shorten(path: str) -> str:
    steps = [step for step in path.split("/") if step not in ("while", "body", "closed_call")]
    return "/".join(steps[-4:])


def summarise(events: Iterable[dict[str, Any]], where: dict[str, str]) -> list[Spent]:
    """Sum the operations' own times, the longest first."""
    events = list(events)
    names = {}
    for event in events:
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name"):
            thread = event.get("tid") if event["name"] == "thread_name" else None
            names[event["pid"], thread] = event["args"]["name"]
    on_device = any(name.startswith("/device:") for name in names.values())
    threads = collections.defaultdict(list)
    for event in events:
        if event.get("ph") != "X":
            continue
        process = names.get((event["pid"], None), "")
        thread = names.get((event["pid"], event["tid"]), "")
        if process.startswith("/device:") if on_device else thread != "python":
            threads[event["pid"], event["tid"]].append(event)
    seconds: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.Counter()
    for thread in threads.values():
        for name, own in _own_times(thread):
            if not any(mark in name for mark in _WAITING):
                seconds[name] += own
                calls[name] += 1
    total = sum(seconds.values()) or 1.0
    return [
        Spent(name, spent, spent / total, calls[name], where.get(name, ""))
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def _own_times(thread: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Give (name, seconds less those of the events within) of every event of a thread."""
    ordered = sorted(thread, key=lambda event: (event["ts"], -event["dur"]))
    own, open_events = [event["dur"] for event in ordered], []
    for index, event in enumerate(ordered):
        while open_events and _end(ordered[open_events[-1]]) <= event["ts"]:
            open_events.pop()
        if open_events:
            own[open_events[-1]] -= event["dur"]
        open_events.append(index)
    return [(event["name"], max(time, 0) / 1e6) for event, time in zip(ordered, own)]


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]

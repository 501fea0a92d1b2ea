"""What a run cost, what it was told, and what it ran on."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from h2tune_jax.run import numbers
from h2tune_jax.run.report.html import Html, details, figure, grid, join, note, table, tag
from h2tune_jax.run.report.page import Section
from h2tune_jax.run.report.svg import NUM_COLOURS, Line, legend, line_chart
from h2tune_jax.run.report.teams import mean_over_runs, teams_of
from h2tune_jax.run.report.view import Curve, RunView, single


def cost(views: Sequence[RunView]) -> Section:
    """Build bytes and seconds a round."""
    teams, charts = teams_of(views), []
    fields = (
        ("records", "bytes_up", "Uploaded", "MB a round", 1e6),
        ("records", "bytes_down", "Downloaded", "MB a round", 1e6),
        ("timings", "seconds", "Time", "seconds a round", 1.0),
        ("timings", "clients_per_second", "Clients trained", "a second", 1.0),
    )
    for source, field, title, unit, scale in fields:
        lines = []
        for team in teams:
            found = [_over_rounds(getattr(view, source), field, scale) for view in team.runs]
            found = [one for one in found if len(one.rounds)]
            if found:
                lines.append(Line(team.name, *mean_over_runs(found), team.colour))
        if lines:
            name = f"{title}, {unit}"
            chart = line_chart(name, lines, from_zero=True, height=180)
            charts.append(figure(chart, join([title, tag("small", f" {unit}")])))
    if not charts:
        return Section("cost", "Bytes and time", note("Nothing was recorded of either."))
    names = [(f"c{team.colour % NUM_COLOURS}", team.name) for team in teams]
    rows = [_cost_row(view) for view in views]
    header = ["run", "rounds", "uploaded", "downloaded", "up a round", "down a round",
              "time", "median round", "clients a second"]  # fmt: skip
    body = [
        table(header, rows),
        legend(names),
        grid(*charts),
        note(
            "Bytes are what would travel between server and clients. Time is the clock's, of the "
            "machine that simulated all clients; compiling falls into the first rounds."
        ),
    ]
    return Section("cost", "Bytes and time", join(body))


def _over_rounds(records: Sequence[dict], field: str, scale: float) -> Curve:
    there = [r for r in records if field in r and r.get("round", -1) >= 0]
    values = [numbers.number(r[field]) / scale for r in there]
    return single([r["round"] + 1 for r in there], values)


def _cost_row(view: RunView) -> list[object]:
    rounds = [r for r in view.records if r.get("round", -1) >= 0]
    up = [numbers.number(r.get("bytes_up")) for r in rounds]
    down = [numbers.number(r.get("bytes_down")) for r in rounds]
    times = [r for r in view.timings if r.get("round", -1) >= 0]
    seconds = [numbers.number(r.get("seconds")) for r in times]
    speed = [numbers.number(r.get("clients_per_second")) for r in times]
    mean = lambda values: float(np.mean(values)) if values else None
    median = lambda values: float(np.median(values)) if values else None
    return [
        view.label, f"{len(rounds):,}", numbers.size(sum(up)), numbers.size(sum(down)),
        numbers.size(mean(up)), numbers.size(mean(down)),
        numbers.duration(sum(seconds) if seconds else None), numbers.duration(median(seconds)),
        numbers.plain(median(speed)),
    ]  # fmt: skip


def settings(views: Sequence[RunView]) -> Section:
    """Build the configs as they were resolved."""
    shown = [
        details(f"{view.label}: config.toml", tag("pre", view.config_text, tabindex="0"))
        for view in views
    ]
    return Section("config", "Config", join(shown))


def environment(views: Sequence[RunView]) -> Section:
    """Build what run.json says: versions, device, seed, commit."""
    parts: list[Html] = []
    for view in views:
        facts = [("folder", view.folder.name), ("seed", view.seed)]
        known = {key: value for key, value in view.info.items() if key != "groups"}
        facts += list(flatten(known))
        shown = table(["", view.label], [[key, str(value)] for key, value in facts])
        parts.append(details(view.label, shown))
        if not view.info:
            parts.append(note(f"{view.label} has no run.json, so its environment is not known."))
    return Section("environment", "Environment", join(parts))


def flatten(facts: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """List nested facts as (dotted name, value)."""
    found = []
    for key, value in facts.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping):
            found += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            found.append((name, ", ".join(map(str, value))))
        else:
            found.append((name, value))
    return found

"""What was run and what is still to run: the lines of results/<setting>.csv, and the plan's rule."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from plan_types import LADDER, Row, Setting, fingerprint, own_rows

from h2tune_jax.bench import rows as csv_rows

COLUMNS = (
    "setting", "row", "plan", "rate", "seed", "split", "round", "client", "examples", "accuracy", "loss",
    "refused", "numbers_up", "numbers_down", "seconds", "device", "cores", "jax",
)  # fmt: skip
COST_COLUMNS = "setting", "row", "plan", "trained", "planned_bytes", "device", "jax"
WHOLE = frozenset(("seed", "round", "examples", "refused", "numbers_up", "numbers_down", "cores"))
NUMBERS = frozenset(("rate", "accuracy", "loss", "seconds"))

Line = Mapping[str, Any]


class Run(NamedTuple):
    """One training: what a line of the CSV is known by.

    Lines of the splits "downloaded", "newcomer" and "without" stand beside those of "test": they are of
    the same training.
    """

    row: str
    rate: float
    seed: int
    split: str  # which rows it is measured on: "validation" or "test"


class OtherPlan(Exception):
    """A results file has lines of another plan."""


class RateUnknown(Exception):
    """A row takes a rate that has not been chosen yet."""


def path_of(name: str, folder: Path) -> Path:
    return folder / f"{name}.csv"


def read(path: Path) -> Sequence[Line]:
    """Read a results file: all lines of finished runs. A file that has not changed is read once."""
    if not path.is_file():
        return ()
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=16)
def _read(path: Path, changed: int, size: int) -> Sequence[Line]:
    return csv_rows.read(path, whole=WHOLE, numbers=NUMBERS)


def append(path: Path, lines: Iterable[Line]) -> None:
    """Append the lines of one run, all or none."""
    csv_rows.append(path, lines, COLUMNS)


def append_cost(folder: Path, line: Line) -> None:
    """Append what `costs.py` found of one row."""
    csv_rows.append(folder / "costs.csv", [line], COST_COLUMNS)


def costs_of(setting: Setting, folder: Path) -> dict[str, dict[str, Any]]:
    """Read what `costs.py` found, by row; also of those that another setting runs for this one."""
    names = frozenset((setting.name, setting.shares))
    numbers = frozenset(("trained", "planned_bytes"))
    lines = csv_rows.read(folder / "costs.csv", whole=frozenset(), numbers=numbers)
    return {
        line["row"]: line
        for line in lines
        if line["setting"] in names
        and line["row"] in setting.rows
        and line["plan"] == fingerprint(setting, setting.rows[line["row"]])
    }


def measured(setting: Setting, settings: Mapping[str, Setting], folder: Path) -> list[Line]:
    """Read the lines of all rows of a setting, also of those that another setting runs for it.

    On test rows only those with the rate that the rule chooses: after a grid has grown that may be another
    one than before. Rows whose grid is not through are left out. Raises `OtherPlan`.
    """
    kept = []
    for name, row in setting.rows.items():
        if row.by_task_of is not None:
            kept += _by_task(setting, name, row, settings, folder)
            continue
        home, lines = _lines_of(setting, name, settings, folder)
        try:
            rate = rate_of(home, name, home.rows[name], folder)
        except RateUnknown:
            continue
        kept += [line for line in lines if line["split"] == "validation" or line["rate"] == rate]
    return kept


def _by_task(
    setting: Setting, name: str, row: Row, settings: Mapping[str, Setting], folder: Path
) -> list[Line]:
    """Put a row together of those lines of another one that have their task's rate."""
    home, lines = _lines_of(setting, str(row.by_task_of), settings, folder)
    try:
        rates = rates_by_task(home, row, folder)
    except RateUnknown:
        return []
    tested = [line for line in lines if line["split"] != "validation"]
    return [
        {**line, "row": name} for line in tested if line["rate"] == rates[task_of(line["client"])]
    ]


def at_others_rate(
    setting: Setting, settings: Mapping[str, Setting], folder: Path
) -> dict[str, list[Line]]:
    """Read test lines at the rate of another row, by row, of those that are tested at one (`also_at`)."""
    kept = {}
    for name, row in setting.rows.items():
        if row.also_at is None:
            continue
        home, lines = _lines_of(setting, name, settings, folder)
        try:
            rate = rate_of(home, row.also_at, home.rows[row.also_at], folder)
        except RateUnknown:
            continue
        kept[name] = [line for line in lines if (line["split"], line["rate"]) == ("test", rate)]
    return kept


def _lines_of(
    setting: Setting, name: str, settings: Mapping[str, Setting], folder: Path
) -> tuple[Setting, list[Line]]:
    """Read a row's lines, and say in which setting it is run. Raises `OtherPlan`."""
    home = setting
    if setting.shares is not None and name not in own_rows(setting, settings):
        home = settings[setting.shares]
    lines = [line for line in read(path_of(home.name, folder)) if line["row"] == name]
    check_plan(home, {name: home.rows[name]}, lines)
    return home, lines


def run_of(line: Line) -> Run:
    return Run(line["row"], line["rate"], line["seed"], line["split"])


def done(lines: Iterable[Line]) -> set[Run]:
    """Return the runs whose lines are there."""
    return {run_of(line) for line in lines if is_run(line)}


def is_run(line: Line) -> bool:
    """Say whether a line is of a run's own split, not of what stands beside it."""
    return line["split"] in ("validation", "test")


def check_plan(setting: Setting, rows: Mapping[str, Row], lines: Iterable[Line]) -> None:
    """Refuse lines that were made by another plan. Raises `OtherPlan`."""
    for line in lines:
        row = rows.get(line["row"])
        if row is not None and line["plan"] != fingerprint(setting, row):
            raise OtherPlan(
                f"{setting.name}.csv has lines of row {line['row']!r} that another plan made: take them out"
            )


def chosen_rate(lines: Iterable[Line], row: str, rates: Sequence[float]) -> float:
    """Apply the rule: the best mean accuracy on validation rows; a tie goes to the lower rate.

    A rate at which clients were refused, as what they trained was not finite, is out, unless none is
    without. Raises `RateUnknown` until the grid is through, with what it has grown by.
    """
    lines = list(lines)
    grid = grid_of(lines, row, rates)
    if missing := [f"{rate:g}" for rate in grid if not _validated(lines, row, rate)]:
        raise RateUnknown(f"row {row!r} has no validation lines at rate {', '.join(missing)}")
    return _best(lines, row, grid)


def grid_of(lines: Iterable[Line], row: str, rates: Sequence[float]) -> tuple[float, ...]:
    """Return a row's grid: its rates, and further ones as long as the best is at an end of them."""
    lines, grid = list(lines), sorted(rates)
    while all(_validated(lines, row, rate) for rate in grid):
        best = _best(lines, row, grid)
        lower = [rate for rate in LADDER if rate < grid[0]]
        higher = [rate for rate in LADDER if rate > grid[-1]]
        if best == grid[0] and lower:
            grid = [max(lower), *grid]
        elif best == grid[-1] and higher:
            grid = [*grid, min(higher)]
        else:
            break
    return tuple(grid)


def _validated(lines: Sequence[Line], row: str, rate: float) -> list[Line]:
    wanted = row, rate, "validation"
    return [line for line in lines if (line["row"], line["rate"], line["split"]) == wanted]


def _best(lines: Sequence[Line], row: str, grid: Sequence[float]) -> float:
    found = {rate: _validated(lines, row, rate) for rate in grid}
    refused = {rate: sum(line["refused"] for line in own) for rate, own in found.items()}
    kept = [rate for rate in grid if refused[rate] == min(refused.values())]
    return max(kept, key=lambda rate: float(np.mean([x["accuracy"] for x in found[rate]])))


def planned(setting: Setting, name: str, row: Row, split: str, folder: Path) -> list[Run]:
    """Return a row's runs on one split, as far as can be told: a grid may still grow.

    Raises `RateUnknown` for those on test rows where their rate cannot be told.
    """
    if split == "validation":
        if not has_grid(setting, row):
            return []
        grid = grid_of(read(path_of(setting.name, folder)), name, row.rates)
        return [Run(name, rate, seed, split) for rate in grid for seed in setting.grid_seeds]
    if row.by_task_of is not None:
        rates = dict.fromkeys(rates_by_task(setting, row, folder).values())
        return [Run(row.by_task_of, rate, seed, split) for rate in rates for seed in setting.seeds]
    tested = [name] if row.also_at is None else [name, row.also_at]
    rates = dict.fromkeys(rate_of(setting, one, setting.rows[one], folder) for one in tested)
    return [Run(name, rate, seed, split) for rate in rates for seed in setting.seeds]


def rate_of(setting: Setting, name: str, row: Row, folder: Path) -> float:
    """Return the rate that a row is tested with. Raises `RateUnknown`."""
    if row.rate_beside is not None:
        return rate_of(setting, row.rate_beside, setting.rows[row.rate_beside], folder)
    beside = setting.shares if row.rate_of is not None else setting.rates_from
    chosen_in, chosen_by = beside or setting.name, row.rate_of or name
    try:
        return chosen_rate(read(path_of(chosen_in, folder)), chosen_by, row.rates)
    except RateUnknown as error:
        raise RateUnknown(
            f"{setting.name} takes the rates that were chosen in {chosen_in}: {error} there; run "
            f"`bench.py {chosen_in} --rows {chosen_by}` first"
        ) from None


def rates_by_task(setting: Setting, row: Row, folder: Path) -> dict[str, float]:
    """Apply the rule to every task by itself, on the grid of the row that is taken apart."""
    base = str(row.by_task_of)
    lines = read(path_of(setting.name, folder))
    chosen_rate(lines, base, row.rates)  # raises where the grid is not through
    own = [line for line in lines if line["row"] == base]
    tasks = dict.fromkeys(task_of(line["client"]) for line in own)
    grid = grid_of(lines, base, row.rates)
    return {
        task: _best([line for line in own if task_of(line["client"]) == task], base, grid)
        for task in tasks
    }


def task_of(client: str) -> str:
    """Return the task of a client such as "minilm6-trec/0"."""
    return client.split("/")[0].split("-")[1]


def has_grid(setting: Setting, row: Row) -> bool:
    """Say whether a row's rate is chosen here."""
    others = setting.rates_from, row.rate_of, row.rate_beside, row.by_task_of
    return all(other is None for other in others)


class Progress(NamedTuple):
    """How far some rows of a setting are."""

    finished: int
    total: int
    seconds: float  # of the finished runs together
    left: float | None  # seconds, if the other runs take as long as these did; None: nobody knows


def progress(setting: Setting, chosen: Mapping[str, Row], folder: Path) -> Progress:
    """Tell how far a setting's rows are: what is planned now, and of that what is done.

    A file may hold more: tests with a rate that is not the best any more, validations of another grid.
    """
    lines = read(path_of(setting.name, folder))
    homes = {row.by_task_of or name for name, row in chosen.items()}
    seconds = {
        run_of(line): line["seconds"] for line in lines if line["row"] in homes and is_run(line)
    }
    runs: set[Run] = set()
    unknown = 0
    for name, row in chosen.items():
        runs |= set(planned(setting, name, row, "validation", folder))
        try:
            runs |= set(planned(setting, name, row, "test", folder))
        except RateUnknown:
            unknown += len(setting.seeds)
    finished, total = len(runs & seconds.keys()), len(runs) + unknown
    spent = sum(seconds.values())
    left = (total - finished) * spent / len(seconds) if seconds else None
    return Progress(finished, total, spent, left)

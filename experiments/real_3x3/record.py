"""What was run and what is still to run: the lines of results/<setting>.csv, and the plan's rule."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from plan_types import Row, Setting, fingerprint, own_rows

from h2tune_jax.bench import rows as csv_rows

COLUMNS = (
    "setting", "row", "plan", "rate", "seed", "split", "round", "client", "examples", "accuracy", "loss",
    "refused", "numbers_up", "numbers_down", "seconds", "device", "cores", "jax",
)  # fmt: skip
WHOLE = frozenset(("seed", "round", "examples", "refused", "numbers_up", "numbers_down", "cores"))
NUMBERS = frozenset(("rate", "accuracy", "loss", "seconds"))

Line = Mapping[str, Any]


class Run(NamedTuple):
    """One training: what a line of the CSV is known by.

    Lines of the splits "downloaded" and "newcomer" stand beside those of "test": they are of the same
    training.
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


def read(path: Path) -> list[dict[str, Any]]:
    """Read a results file: all lines of finished runs."""
    return csv_rows.read(path, whole=WHOLE, numbers=NUMBERS)


def append(path: Path, lines: Iterable[Line]) -> None:
    """Append the lines of one run, all or none."""
    csv_rows.append(path, lines, COLUMNS)


def measured(
    setting: Setting, settings: Mapping[str, Setting], folder: Path
) -> list[dict[str, Any]]:
    """Read the lines of all rows of a setting, also of those that another setting runs for it."""
    own = own_rows(setting, settings)
    lines = [x for x in read(path_of(setting.name, folder)) if x["row"] in own]
    if setting.shares is not None:
        theirs = setting.rows.keys() - own.keys()
        lines += [x for x in read(path_of(setting.shares, folder)) if x["row"] in theirs]
    return lines


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
    without.
    """
    found = {rate: [] for rate in sorted(rates)}
    refused = dict.fromkeys(found, 0)
    for line in lines:
        if (line["row"], line["split"]) == (row, "validation") and line["rate"] in found:
            found[line["rate"]].append(line["accuracy"])
            refused[line["rate"]] += line["refused"]
    missing = [f"{rate:g}" for rate, values in found.items() if not values]
    if missing:
        raise RateUnknown(f"row {row!r} has no validation lines at rate {', '.join(missing)}")
    least = min(refused.values())
    means = {rate: float(np.mean(found[rate])) for rate in found if refused[rate] == least}
    return max(means, key=lambda rate: means[rate])


def planned(setting: Setting, name: str, row: Row, split: str, folder: Path) -> list[Run]:
    """Return a row's runs on one split; those on test rows when their rate can be told.

    Raises `RateUnknown`.
    """
    if split == "validation":
        grid = row.rates if has_grid(setting, row) else ()
        return [Run(name, rate, seed, split) for rate in grid for seed in setting.grid_seeds]
    beside = setting.shares if row.rate_of is not None else setting.rates_from
    chosen_in, chosen_by = beside or setting.name, row.rate_of or name
    try:
        rate = chosen_rate(read(path_of(chosen_in, folder)), chosen_by, row.rates)
    except RateUnknown as error:
        raise RateUnknown(
            f"{setting.name} takes the rates that were chosen in {chosen_in}: {error} there; run "
            f"`bench.py {chosen_in} --rows {chosen_by}` first"
        ) from None
    return [Run(name, rate, seed, split) for seed in setting.seeds]


def num_runs(setting: Setting, row: Row) -> int:
    """Count a row's runs, those of the grid included."""
    grid = len(row.rates) * len(setting.grid_seeds) if has_grid(setting, row) else 0
    return grid + len(setting.seeds)


def has_grid(setting: Setting, row: Row) -> bool:
    """Say whether a row's rate is chosen here."""
    return setting.rates_from is None and row.rate_of is None


class Progress(NamedTuple):
    """How far some rows of a setting are."""

    finished: int
    total: int
    seconds: float  # of the finished runs together
    left: float | None  # seconds, if the other runs take as long as these did; None: nobody knows


def progress(setting: Setting, chosen: Mapping[str, Row], lines: Iterable[Line]) -> Progress:
    """Tell how far a setting's rows are, from its lines."""
    seconds = {
        run_of(line): line["seconds"] for line in lines if line["row"] in chosen and is_run(line)
    }
    total = sum(num_runs(setting, row) for row in chosen.values())
    spent = sum(seconds.values())
    left = (total - len(seconds)) * spent / len(seconds) if seconds else None
    return Progress(len(seconds), total, spent, left)

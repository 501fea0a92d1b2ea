"""A study's rows: a CSV file a setting, written piece by piece, so that a stopped study goes on.

Lines that begin with "#" say where the rows come from: the setting as JSON in the first, and one after
the rows of each finished horizon. Rows without that line are of an unfinished piece and do not count.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from h2tune_jax.study.horizon import BINS, Outcome
from h2tune_jax.study.norms import Norms
from h2tune_jax.types import FederationError

COLUMNS = (
    "horizon",
    "constant",
    "seed",
    *Norms._fields,  # means over the rounds
    *(f"last_{field}" for field in Norms._fields),
    "rejected",
)
ROUND_COLUMNS = ("horizon", "constant", "first_round", "last_round", *Norms._fields)

Rows = dict[str, np.ndarray]  # by column, one entry a row


def write_piece(
    path: Path, setting: dict[str, Any], horizon: int, constants, seeds, outcome: Outcome, note: str
) -> None:
    """Append the rows of one horizon, and the line that says it is finished."""
    finished = read_finished(path, setting)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, f"# setting: {json.dumps(setting)}\n{','.join(COLUMNS)}\n")
    elif horizon in finished:
        raise FederationError(f"{path}: horizon {horizon} is finished already")
    fields = [*outcome.mean, *outcome.last, outcome.rejected]
    table = np.stack([np.asarray(field, float) for field in fields], axis=1)
    lines = [
        ",".join([str(horizon), _number(constant), str(seed), *map(_number, row)])
        for constant, seed, row in zip(constants, seeds, table)
    ]
    _append(path, "\n".join(lines) + f"\n# horizon {horizon}: {note}\n")


def write_rounds(path: Path, horizon: int, constants, outcome: Outcome) -> None:
    """Write what the norms were over the rounds of one horizon, as means over seeds and bins."""
    constants = np.asarray(constants)
    lines = [",".join(ROUND_COLUMNS)]
    for constant in dict.fromkeys(constants.tolist()):
        means = [np.asarray(field)[constants == constant].mean(axis=0) for field in outcome.binned]
        for place in range(BINS):
            first = 2**place - 1
            if first < horizon:
                last = min(2 * first, horizon - 1)
                values = [_number(float(mean[place])) for mean in means]
                head = [str(horizon), _number(constant), str(first), str(last)]
                lines.append(",".join(head + values))
    path.write_text("\n".join(lines) + "\n")


def read_finished(path: Path, setting: dict[str, Any] | None = None) -> list[int]:
    """Return the finished horizons, and cut off what an interrupted run left behind them.

    With a setting, a file of another one is refused.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    if setting is not None and lines[:1]:
        found = json.loads(lines[0].removeprefix("# setting: "))
        wanted = json.loads(json.dumps(setting))
        if found != wanted:
            odd = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
            raise FederationError(
                f"{path} holds rows of another setting (it differs in {', '.join(odd)}); "
                "move it away, or write elsewhere"
            )
    ends = [place for place, line in enumerate(lines) if re.match(r"# horizon \d+:", line)]
    whole = lines[: ends[-1] + 1] if ends else lines[:2]
    if len(whole) < len(lines):
        path.write_text("".join(whole))
    return [int(lines[place].split()[2].rstrip(":")) for place in ends]


def read_setting(path: Path) -> dict[str, Any]:
    """Return the setting that a file's rows belong to."""
    with path.open() as file:
        return json.loads(file.readline().removeprefix("# setting: "))


def read_rows(path: Path) -> Rows:
    """Read the rows of all finished horizons, sorted by horizon."""
    done = read_finished(path)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    header, *body = lines
    table = np.array([[float(cell) for cell in line.split(",")] for line in body])
    table = table.reshape(len(body), len(COLUMNS))
    table = table[np.isin(table[:, 0], done)]
    table = table[np.argsort(table[:, 0], kind="stable")]
    return dict(zip(header.split(","), table.T))


def read_notes(path: Path) -> list[str]:
    """Return the lines about where the rows come from, the setting's left out."""
    lines = path.read_text().splitlines()
    return [line.removeprefix("# ") for line in lines[1:] if line.startswith("#")]


def read_rounds(path: Path) -> Rows:
    """Read what `write_rounds` wrote."""
    header, *body = path.read_text().splitlines()
    table = np.array([[float(cell) for cell in line.split(",")] for line in body])
    return dict(zip(header.split(","), table.T))


def by_seed(rows: Rows, constant: float, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrange one constant's values: -> (horizons [H], [H, seeds])."""
    chosen = rows["constant"] == constant
    horizons = np.unique(rows["horizon"][chosen]).astype(np.int64)
    each = [values[chosen & (rows["horizon"] == horizon)] for horizon in horizons]
    return horizons, np.stack(each) if each else np.zeros((0, 0))


def _number(value: float) -> str:
    whole = np.isfinite(value) and value == int(value) and abs(value) < 1e6
    return str(int(value)) if whole else f"{value:.8g}"


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())

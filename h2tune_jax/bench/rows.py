"""Rows of measurements in a CSV file: appended, never rewritten."""

import csv
import dataclasses
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from h2tune_jax.bench.cases import Case
from h2tune_jax.run.disk import write_all

CASE_COLUMNS = tuple(field.name for field in dataclasses.fields(Case))
COLUMNS = (
    "time",
    *CASE_COLUMNS,
    "weights",
    "skipped",
    "runs",
    "seconds",
    "seconds_low",
    "seconds_high",
    "clients_per_second",
    "examples_per_second",
    "tokens_per_second",
    "compile_seconds",
    "compile_low",
    "compile_high",
    "planned_bytes",
    "peak_bytes",
    "tflop_a_round",
    "gflops",
    "peak_gflops",
    "peak_low",
    "peak_high",
    "share_of_peak",
    "device",
    "platform",
    "cores",
    "memory_gb",
    "python",
    "jax",
    "jaxlib",
    "h2tune_jax",
)
NUMBERS = frozenset(COLUMNS[COLUMNS.index("runs") : COLUMNS.index("device")])
WHOLE = frozenset(("clients", "rank", "devices", "batch", "length", "steps"))


def append(
    file: Path, rows: Iterable[Mapping[str, Any]], columns: tuple[str, ...] = COLUMNS
) -> None:
    """Append rows; a new file gets a header, and an old one must have the same."""
    rows = list(rows)
    if file.is_file() and file.stat().st_size:
        with file.open(newline="") as stream:
            header = tuple(next(csv.reader(stream)))
        if header != columns:
            raise ValueError(
                f"{file}: its columns are not those of this version; name another file"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not file.is_file() or file.stat().st_size == 0:
        writer.writeheader()
    writer.writerows({name: _text(row.get(name)) for name in columns} for row in rows)
    # In one write, and on the disk: a kill leaves all of the rows or none.
    with file.open("ab", buffering=0) as stream:
        write_all(stream, text.getvalue().encode())
        os.fsync(stream.fileno())


def _text(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def read(
    file: Path, *, whole: frozenset = WHOLE, numbers: frozenset = NUMBERS
) -> list[dict[str, Any]]:
    """Read rows back; empty cells are None, and numbers are numbers."""
    if not file.is_file():
        return []

    def parse(name: str, text: str) -> Any:
        if text == "":
            return None
        return int(text) if name in whole else float(text) if name in numbers else text

    with file.open(newline="") as stream:
        return [{k: parse(k, v) for k, v in row.items()} for row in csv.DictReader(stream)]


def newest(rows: Iterable[Mapping[str, Any]], key: tuple[str, ...]) -> list[dict[str, Any]]:
    """Keep, of rows that agree in `key`, the last; in the order in which keys first came."""
    last: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        last[tuple(row[name] for name in key)] = dict(row)
    return list(last.values())

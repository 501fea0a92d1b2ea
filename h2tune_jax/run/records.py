"""The lines that a run writes: one JSON object a round, appended, and cut back on resume.

metrics.jsonl holds what was computed, and is the same bit for bit however often a run was interrupted;
timings.jsonl holds clock readings. Floats are written so that they read back exactly; numbers that are
not finite are null.
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax.run.disk import reading, sync_path, write_all, writing


class Mark(NamedTuple):
    """How far a log had come: its first bytes, and their digest."""

    size: int
    sha256: str


def plain(value: Any) -> Any:
    """Turn arrays and numpy scalars into lists and numbers that JSON can hold."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "dtype"):
        value = np.asarray(value)
        if not (value.dtype == bool or np.issubdtype(value.dtype, np.integer)):
            value = value.astype(np.float64)  # bfloat16 has no Python number of its own
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode(record: dict[str, Any]) -> bytes:
    """Return a record's line."""
    return (json.dumps(record, allow_nan=False) + "\n").encode()


class Log:
    """A file of lines that is appended to.

    Args:
      path: the file.
      keep: so many bytes of it stay; the rest, lines that will be written again, goes.
    """

    def __init__(self, path: Path, keep: int):
        self.path = path
        with writing(path.name, path):
            if not path.exists():
                path.touch()
                sync_path(path.parent)
            # Unbuffered: what a full disk refused is not tried again on closing.
            self._file = path.open("r+b", buffering=0)
            head = self._file.read(keep)
            if path.stat().st_size > len(head):
                self._file.truncate()
        self._size, self._digest = len(head), hashlib.sha256(head)

    def append(self, record: dict[str, Any]) -> None:
        """Write a line; it outlasts the process, though not a power cut before `sync`."""
        line = encode(record)
        with writing(self.path.name, self.path):
            write_all(self._file, line)
        self._size += len(line)
        self._digest.update(line)

    def mark(self) -> Mark:
        """Return how far the log has come."""
        return Mark(self._size, self._digest.hexdigest())

    def sync(self) -> None:
        """Make what was written outlast a power cut."""
        with writing(self.path.name, self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path, size: int | None = None) -> list[dict[str, Any]]:
    """Read the records of a log, or of its first `size` bytes, as far as `read_log` can."""
    return read_log(path, size)[0]


def read_log(path: Path, size: int | None = None) -> tuple[list[dict[str, Any]], str]:
    """Read a log up to the first line that is damaged: -> (records, what is wrong, "" for nothing).

    A line cut short at the end is no damage: it is being written, or a kill came.
    """
    records, reason = _parse(path, size)
    if reason:  # a run that was resumed while this was read has cut its log back meanwhile
        records, reason = _parse(path, size)
    return records, reason


def _parse(path: Path, size: int | None) -> tuple[list[dict[str, Any]], str]:
    records = []
    for number, line in enumerate(whole_lines(path, size), 1):
        record = parse_line(line)
        if record is None:
            return records, f"line {number} of {path.name} is damaged, and what follows is left out"
        records.append(record)
    return records, ""


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return a line's record; None where it holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def whole_lines(path: Path, size: int | None = None) -> list[bytes]:
    """Return the lines of a log, or of its first `size` bytes, without one cut short at the end."""
    with reading(path.name, path):
        try:
            with path.open("rb") as file:
                data = file.read() if size is None else file.read(size)
        except FileNotFoundError:
            return []
    return data.split(b"\n")[:-1]


def lines_size(path: Path, rounds: int) -> int:
    """Return the bytes of the lines whose round is below `rounds`, up to the first that is not."""
    size = 0
    for line in whole_lines(path):
        record = parse_line(line)
        if record is None or not isinstance(record.get("round"), int) or record["round"] >= rounds:
            break
        size += len(line) + 1
    return size

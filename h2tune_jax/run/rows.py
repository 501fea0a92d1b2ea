"""Clients as rows of bytes, and the append-only files that hold them.

A client's row is the bytes of its leaves, one after the other; all clients of a cohort have rows of
equal length. A segment is a file of rows that is written once, with its SHA-256; where a client's newest
row lies is said by an index, which is part of a checkpoint. So a checkpoint costs what changed since the
last, and an old one stays whole for as long as its segments are kept.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from h2tune_jax.run.disk import Gone, make_folder, reading, sync_path, write_all, writing
from h2tune_jax.run.records import Mark
from h2tune_jax.types import PyTree


class Layout(NamedTuple):
    """How a client's leaves lie in its row."""

    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    treedef: Any

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each leaf."""
        return tuple(
            int(np.prod(shape)) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes)
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(self.sizes)

    def describe(self) -> list[list[Any]]:
        """Return path, type and shape of each leaf, for a manifest."""
        return [[p, str(d), list(s)] for p, s, d in zip(self.paths, self.shapes, self.dtypes)]


def layout_of(client: PyTree) -> Layout:
    """Lay out a cohort's rows; `client` has the leaves (or shapes) of one client."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(client)
    return Layout(
        tuple(jax.tree_util.keystr(path) for path, _ in leaves),
        tuple(tuple(leaf.shape) for _, leaf in leaves),
        tuple(np.dtype(leaf.dtype) for _, leaf in leaves),
        treedef,
    )


def pack(layout: Layout, count: int, clients: PyTree) -> list[np.ndarray]:
    """Turn clients (leaves [count, ...]) into rows, u8[row_bytes] each; waits for the device."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(clients)]
    flat = [np.ascontiguousarray(leaf).reshape(-1).view(np.uint8) for leaf in leaves]
    rows = []
    for i in range(count):
        row, at = np.empty(layout.row_bytes, np.uint8), 0
        for part, size in zip(flat, layout.sizes):
            row[at : at + size] = part[i * size : (i + 1) * size]
            at += size
        rows.append(row)
    return rows


def unpack(
    layout: Layout, count: int, rows: Iterable[tuple[int, np.ndarray]]
) -> PyTree:  # leaves [count, ...]
    """Turn rows, each with its place, into clients; places without a row stay zero."""
    leaves = [
        np.zeros((count, *shape), dtype) for shape, dtype in zip(layout.shapes, layout.dtypes)
    ]
    flat = [leaf.reshape(-1).view(np.uint8) for leaf in leaves]
    for place, row in rows:
        at = 0
        for part, size in zip(flat, layout.sizes):
            part[place * size : (place + 1) * size] = row[at : at + size]
            at += size
    return layout.treedef.unflatten(leaves)


class Location(NamedTuple):
    """Where a row lies."""

    segment: int
    row: int


class Segments:
    """The segments of one cohort: writes them, reads rows of them, and deletes what nobody needs.

    Args:
      home: the folder of all segments, RUN/clients.
      cohort: the cohort's place.
      row_bytes: of this cohort.
    """

    def __init__(self, home: Path, cohort: int, row_bytes: int):
        self.home, self._cohort, self._row_bytes = home, cohort, row_bytes
        self.marks: dict[int, Mark] = {}
        self._next = 1 + max((self._number(path) for path in self._all()), default=-1)

    def _all(self) -> Iterable[Path]:
        return self.home.glob(f"{self._cohort}-*.rows")

    def _number(self, path: Path) -> int:
        return int(path.stem.partition("-")[2])

    def name(self, segment: int) -> str:
        """Return a segment's path below the run's folder."""
        return f"{self.home.name}/{self._cohort}-{segment:06d}.rows"

    def path(self, segment: int) -> Path:
        """Return a segment's path."""
        return self.home.parent / self.name(segment)

    def write(self, rows: Iterable[np.ndarray]) -> int:
        """Write a new segment: -> its number."""
        segment = self._next
        self._next += 1
        path, digest, size = self.path(segment), hashlib.sha256(), 0
        with writing("clients' states", path):
            try:
                make_folder(self.home)
                with path.open("xb", buffering=0) as file:
                    for row in rows:
                        write_all(file, row.data)
                        digest.update(row.data)
                        size += row.nbytes
                    os.fsync(file.fileno())
                sync_path(self.home)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        self.marks[segment] = Mark(size, digest.hexdigest())
        return segment

    def read(
        self, places: Sequence[tuple[int, Location]]
    ) -> Iterable[tuple[int, np.ndarray]]:  # (place, a view of its row)
        """Read rows through memory maps that last no longer than the reading.

        Raises `Gone` where a segment is no longer there.
        """
        by_segment: dict[int, list[tuple[int, int]]] = {}
        for place, (segment, row) in places:
            by_segment.setdefault(segment, []).append((place, row))
        for segment, wanted in sorted(by_segment.items()):
            if not self._row_bytes:  # there is nothing that could be mapped
                yield from ((place, np.empty(0, np.uint8)) for place, _ in wanted)
                continue
            rows = self._map(segment)
            for place, row in wanted:
                yield place, rows[row]

    def _map(self, segment: int) -> np.ndarray:  # u8[rows, row_bytes]
        path = self.path(segment)
        with reading("clients' states", path):
            try:
                return np.memmap(path, np.uint8, "r").reshape(-1, self._row_bytes)
            except FileNotFoundError:
                raise Gone(f"{path} is no longer there: its run has gone on; try again") from None

    def keep(self, names: set[str]) -> None:
        """Delete every segment but those of these names, unknown ones included."""
        for path in self._all():
            number = self._number(path)
            if self.name(number) not in names:
                path.unlink(missing_ok=True)
                self.marks.pop(number, None)


def index_array(index: Mapping[int, Location]) -> np.ndarray:  # i64[3, seen]
    """Return an index as an array: client, segment, row; by client."""
    entries = [(client, *place) for client, place in sorted(index.items())]
    return np.asarray(entries, np.int64).reshape(-1, 3).T.copy()


def index_from(array: np.ndarray) -> dict[int, Location]:
    """Return the index that `index_array` gave."""
    return {int(c): Location(int(s), int(r)) for c, s, r in np.asarray(array).T}

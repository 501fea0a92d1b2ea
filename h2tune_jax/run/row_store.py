"""The clients that have trained, as rows in host memory or in files.

Who never trained takes no space, being a function of the seed. Only participants travel, and the next
round's are on their way while the present one computes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

from h2tune_jax.run import checkpoint
from h2tune_jax.run.checkpoint import Arrays
from h2tune_jax.run.disk import RunError
from h2tune_jax.run.folder import RunFolder
from h2tune_jax.run.programs import Programs, put_rows
from h2tune_jax.run.records import Mark
from h2tune_jax.run.rows import (
    Layout,
    Location,
    Segments,
    index_array,
    index_from,
    layout_of,
    pack,
    unpack,
)
from h2tune_jax.run.sampling import Participants
from h2tune_jax.run.store import Frozen, start_many
from h2tune_jax.run.worker import Worker
from h2tune_jax.types import FederationError, PyTree


class RowStore:
    """The clients that have trained, as rows: in host memory ("host") or in files ("file").

    Rows are handled by the worker alone, in order: so a load sees what was put before it was queued. On
    the device stay the last round's participants: who takes part twice in a row does not travel.

    Args:
      programs: of the run.
      worker: does the loading and storing.
      folder: the run's, for the files; None with `in_files=False`: no checkpoints will be taken.
      in_files: rows live in files, not in memory.
    """

    def __init__(
        self, programs: Programs, worker: Worker, folder: RunFolder | None, *, in_files: bool
    ):
        if in_files and folder is None:
            raise FederationError("store 'file' needs a run folder (out=...): its rows live there")
        self._programs, self._worker, self._in_files = programs, worker, in_files
        shapes = programs.client_shapes(programs.server_shapes())
        self._layouts = tuple(layout_of(client) for client in shapes)
        count = len(shapes)
        # Of the main thread.
        self.seen: tuple[set[int], ...] = tuple(set() for _ in range(count))
        self._last: tuple[Participants, tuple[PyTree, ...]] | None = None
        self._coming: tuple[Participants, Future] | None = None
        # Of the worker.
        self._rows: tuple[dict[int, np.ndarray], ...] = tuple({} for _ in range(count))
        self._changed: tuple[set[int], ...] = tuple(set() for _ in range(count))
        self._index: tuple[dict[int, Location], ...] = tuple({} for _ in range(count))
        self._segments: tuple[Segments, ...] = ()
        if folder is not None:
            self._segments = tuple(
                Segments(folder.clients, cohort, layout.row_bytes)
                for cohort, layout in enumerate(self._layouts)
            )
        self._kept: set[str] = set()
        self._frozen: list[set[str]] = []  # of checkpoints that are not written yet

    def begin(self, server: PyTree) -> None:
        self.collect(set())

    def restore(self, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        for cohort, (layout, segments) in enumerate(zip(self._layouts, self._segments)):
            if meta["layouts"][cohort] != layout.describe():
                raise RunError(
                    f"the checkpoint's clients of group {self._programs.specs[cohort].name!r} have other "
                    "leaves than this method gives them; it is of another federation or method"
                )
            index = index_from(arrays[f".index[{cohort}]"])
            self.seen[cohort].update(index)
            self._index[cohort].update(index)
            marks = meta["segments"][cohort]
            segments.marks.update((int(number), Mark(*mark)) for number, mark in marks.items())
            if not self._in_files:
                places = [(client, place) for client, place in index.items()]
                for client, row in segments.read(places):
                    self._rows[cohort][client] = np.array(row)

    def take(self, server: PyTree, ids: Participants) -> tuple[PyTree, ...]:
        if self._coming is None or not _same(self._coming[0], ids):
            self._coming = ids, self._worker.submit(self._load_all, self._absent(ids))
        loaded = self._coming[1].result()
        self._coming = None
        return tuple(
            self._complete(server, cohort, chosen, rows)
            for cohort, (chosen, rows) in enumerate(zip(ids, loaded))
        )

    def put(
        self, ids: Participants, clients: tuple[PyTree, ...], following: Participants | None
    ) -> None:
        self._last = ids, clients
        for seen, chosen in zip(self.seen, ids):
            seen.update(chosen.tolist())
        if following is not None:
            # Queued before the rows of this round, for which the worker waits until it is over.
            loading = self._worker.submit(self._load_all, self._absent(following))
            self._coming = following, loading
        self._worker.submit(self._absorb, ids, clients)

    def look(self, server: PyTree, cohort: int, ids: np.ndarray) -> PyTree:
        wanted = self._absent_of(cohort, ids)
        if wanted:
            rows = self._worker.submit(self._load, cohort, len(ids), wanted).result()
        else:  # the worker may be waiting for the round that computes
            rows = self._programs.place(unpack(self._layouts[cohort], len(ids), ()))
        return self._complete(server, cohort, ids, rows)

    def freeze(self) -> Future:
        return self._worker.submit(self._freeze)

    def _absent(self, ids: Participants) -> list[tuple[int, list[tuple[int, int]]]]:
        return [(len(chosen), self._absent_of(i, chosen)) for i, chosen in enumerate(ids)]

    def _absent_of(self, cohort: int, ids: np.ndarray) -> list[tuple[int, int]]:
        """Return (place, client) of those who have a row and are not on the device."""
        here = set() if self._last is None else set(self._last[0][cohort].tolist())
        seen = self.seen[cohort]
        return [
            (place, client)
            for place, client in enumerate(ids.tolist())
            if client in seen and client not in here
        ]

    def _complete(self, server: PyTree, cohort: int, ids: np.ndarray, rows: PyTree) -> PyTree:
        """Add those who are on the device, and those who start now."""
        seen = self.seen[cohort]
        if self._last is not None:
            present = {client: i for i, client in enumerate(self._last[0][cohort].tolist())}
            pairs = [(present[c], place) for place, c in enumerate(ids.tolist()) if c in present]
            if pairs:
                rows = put_rows(rows, self._last[1][cohort], *_padded(pairs, len(present)))
        fresh = [(client, place) for place, client in enumerate(ids.tolist()) if client not in seen]
        if fresh:
            width = self._programs.start_width(cohort)
            clients = np.asarray([client for client, _ in fresh], np.int32)
            for i, new in enumerate(start_many(self._programs, server, cohort, clients)):
                part = fresh[i * width : (i + 1) * width]
                pairs = [(source, place) for source, (_, place) in enumerate(part)]
                rows = put_rows(rows, new, *_padded(pairs, width))
        return rows

    # What the worker does

    def _load_all(self, wanted: list[tuple[int, list[tuple[int, int]]]]) -> list[PyTree]:
        return [self._load(cohort, *part) for cohort, part in enumerate(wanted)]

    def _load(self, cohort: int, count: int, wanted: list[tuple[int, int]]) -> PyTree:
        if self._in_files:
            index = self._index[cohort]
            rows = self._segments[cohort].read([(p, index[client]) for p, client in wanted])
        else:
            rows = [(place, self._rows[cohort][client]) for place, client in wanted]
        return self._programs.place(unpack(self._layouts[cohort], count, rows))

    def _absorb(self, ids: Participants, clients: tuple[PyTree, ...]) -> None:
        for cohort, (chosen, new) in enumerate(zip(ids, clients)):
            if not len(chosen):
                continue
            rows = pack(self._layouts[cohort], len(chosen), new)
            named = dict(zip(chosen.tolist(), rows))
            if self._in_files:
                self._write(cohort, named)
            else:
                self._rows[cohort].update(named)
                self._changed[cohort].update(named)
        if self._in_files:
            self._sweep()

    def _write(self, cohort: int, rows: Mapping[int, np.ndarray]) -> None:
        segment = self._segments[cohort].write(rows.values())
        for row, client in enumerate(rows):
            self._index[cohort][client] = Location(segment, row)

    def _freeze(self) -> Frozen:
        for cohort, changed in enumerate(self._changed):
            if changed:
                rows = self._rows[cohort]
                self._write(cohort, {client: rows[client] for client in sorted(changed)})
                changed.clear()
            self._compact(cohort)
        arrays = {f".index[{i}]": index_array(index) for i, index in enumerate(self._index)}
        beside, marks = {}, []
        for index, segments in zip(self._index, self._segments):
            used = {place.segment for place in index.values()}
            marks.append({str(number): list(segments.marks[number]) for number in sorted(used)})
            beside |= {segments.name(number): segments.marks[number] for number in used}
        kind = "file" if self._in_files else "host"
        layouts = [layout.describe() for layout in self._layouts]
        self._frozen.append(set(beside))
        return Frozen(arrays, {"store": kind, "layouts": layouts, "segments": marks}, beside)

    def _compact(self, cohort: int) -> None:
        """Write the rows of half-empty segments anew where more than half of all bytes are stale."""
        index, segments, layout = (
            self._index[cohort],
            self._segments[cohort],
            self._layouts[cohort],
        )
        if not layout.row_bytes:
            return
        live: dict[int, int] = {}
        for place in index.values():
            live[place.segment] = live.get(place.segment, 0) + 1
        held = {number: segments.marks[number].size // layout.row_bytes for number in live}
        if sum(held.values()) <= 2 * len(index):
            return
        sparse = {number for number in live if 2 * live[number] < held[number]}
        moving = sorted(client for client, place in index.items() if place.segment in sparse)
        order = []

        def pass_on() -> Iterator[np.ndarray]:  # a row at a time: they never lie in memory together
            for client, row in segments.read([(client, index[client]) for client in moving]):
                order.append(client)
                yield row

        segment = segments.write(pass_on())
        for row, client in enumerate(order):
            index[client] = Location(segment, row)

    def collect(self, kept: set[str]) -> None:
        self._kept = set(kept)
        del self._frozen[:1]  # checkpoints are written in the order in which they were frozen
        self._sweep()

    def _sweep(self) -> None:
        held = self._kept.union(*self._frozen)
        for index, segments in zip(self._index, self._segments):
            live = {place.segment for place in index.values()}
            segments.keep(held | {segments.name(number) for number in live})


def _same(one: Participants, other: Participants) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _padded(pairs: list[tuple[int, int]], size: int) -> tuple[np.ndarray, np.ndarray, np.int32]:
    """Turn (source, place) pairs into the arguments of `put_rows`."""
    source, place = np.zeros((2, size), np.int32)
    for i, (a, b) in enumerate(pairs):
        source[i], place[i] = a, b
    return source, place, np.int32(len(pairs))


def read_clients(
    folder: RunFolder | str | os.PathLike,
    cohort: int,
    ids: Sequence[int] | None = None,
    step: int | None = None,
) -> tuple[np.ndarray, Arrays]:
    """Read clients of one cohort from a checkpoint, wherever the run kept them: -> (ids, arrays by path).

    Paths are those below a client, such as ".a['q']"; arrays lead with the clients.

    Args:
      folder: the run's.
      cohort: the group's place in the config.
      ids: whom; None means all that the checkpoint holds. Clients that never trained are not held by the
        stores "host" and "file" (they are a function of the seed), and are left out.
      step: rounds done; None means the newest checkpoint that verifies.

    Raises `Gone` where a run under way has deleted rows meanwhile: read again.
    """
    folder = folder if isinstance(folder, RunFolder) else RunFolder(Path(folder))
    return clients_of(folder, *checkpoint.read_arrays(folder, step), cohort, ids)


def clients_of(
    folder: RunFolder,
    arrays: Arrays,
    meta: Mapping[str, Any],
    cohort: int,
    ids: Sequence[int] | None = None,
) -> tuple[np.ndarray, Arrays]:
    """Do what `read_clients` does with a checkpoint that `read_arrays` has read and verified."""
    if meta["store"] == "device":
        prefix = f".clients[{cohort}]"
        held = {
            path.removeprefix(prefix): value
            for path, value in arrays.items()
            if path.startswith(prefix)
        }
        count = next((len(value) for value in held.values()), 0)
        chosen = np.arange(count) if ids is None else np.asarray(ids)
        return chosen, {path: value[chosen] for path, value in held.items()}
    index = index_from(arrays[f".index[{cohort}]"])
    chosen = [client for client in (sorted(index) if ids is None else ids) if client in index]
    paths, dtypes, shapes = zip(*meta["layouts"][cohort]) if meta["layouts"][cohort] else ((),) * 3
    treedef = jax.tree.structure([0] * len(paths))
    layout = Layout(tuple(paths), tuple(map(tuple, shapes)), tuple(map(np.dtype, dtypes)), treedef)
    segments = Segments(folder.clients, cohort, layout.row_bytes)
    places = [(place, index[client]) for place, client in enumerate(chosen)]
    leaves = unpack(layout, len(chosen), segments.read(places))
    return np.asarray(chosen, np.int64), dict(zip(paths, leaves))

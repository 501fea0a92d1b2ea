"""When checkpoints are written, which of them stay, and where a resumed run goes on."""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax.run import checkpoint, write_checkpoint
from h2tune_jax.run.checkpoint import Checkpoint
from h2tune_jax.run.disk import RunError
from h2tune_jax.run.events import Notice, Saved
from h2tune_jax.run.folder import RunFolder
from h2tune_jax.run.records import Log, Mark
from h2tune_jax.run.settings import CheckpointConfig
from h2tune_jax.run.store import Frozen, Store
from h2tune_jax.run.worker import Worker


class Kept(NamedTuple):
    """What is known of a checkpoint on the disk."""

    metric: float | None
    beside: frozenset[str]  # the files beside it that it needs


def choose_kept(kept: Mapping[int, Kept], config: CheckpointConfig) -> set[int]:
    """Return which checkpoints stay: the last few, and the best by their metric."""
    sign = 1 if config.mode == "max" else -1
    ranked = sorted(
        (step for step, entry in kept.items() if entry.metric is not None),
        key=lambda step: (sign * (kept[step].metric or 0.0), step),
        reverse=True,
    )
    return set(sorted(kept)[-config.keep_last :]) | set(ranked[: config.keep_best])


def resume_point(
    folder: RunFolder, config_digest: str, at_most: int | None = None
) -> tuple[Checkpoint | None, list[Notice]]:
    """Find where a run goes on, and put what is damaged out of the way: -> (checkpoint, what was done).

    With `at_most`, later checkpoints are given up: they will be written again. None where there are no
    checkpoints (or none up to `at_most`): the run begins.

    Raises `RunError`, and has changed nothing then, where a checkpoint cannot be read for a reason that
    lies in the machine, and where there are checkpoints of which none verifies: whether to begin anew,
    and to lose what they held, is for people to say.
    """
    found, skipped = checkpoint.restore_newest(folder, config_digest, at_most)
    if found is None and skipped:
        raise RunError(
            f"{folder.path} has checkpoints, and none of them verifies: {'; '.join(skipped)}. Nothing "
            "was changed. To begin anew, choose another folder (--out), or move "
            f"{folder.checkpoints} away and resume, which computes everything again"
        )
    held = checkpoint.steps(folder)[::-1]  # newest first, as `skipped`
    later = [step for step in held if at_most is not None and step > at_most]
    whys = {step: checkpoint.find_damage(folder, step) for step in later}
    given_up = [step for step, why in whys.items() if why is None]
    damaged = {step: why for step, why in whys.items() if why is not None}
    if found is not None:
        passed = [step for step in held if found.step < step and step not in later]
        damaged |= dict(zip(passed, skipped, strict=True))

    notices = []
    for step in write_checkpoint.tidy(folder):
        text = (
            f"the checkpoint of round {step} was being written when the run ended; it is left out"
        )
        notices.append(Notice(text))
    for step, reason in damaged.items():
        name = write_checkpoint.set_aside(folder, step)
        notices.append(Notice(f"{reason}; it was set aside as {name}", "warning"))
    if given_up:
        write_checkpoint.give_up(folder, given_up)
        text = f"gives up the checkpoint of round {', '.join(map(str, given_up))}, to go on in step"
        notices.append(Notice(f"{text} with the other seeds"))
    return found, notices


class Saver:
    """Writes the checkpoints of one run through its worker.

    Args:
      folder: the run's.
      start: rounds of the checkpoint that the run goes on from; 0 where it begins. Later ones do not count.
      config: when and what to keep.
      config_digest: noted in every checkpoint.
      worker: does the writing.
      store: its part is frozen with the server's.
      logs: metrics.jsonl and timings.jsonl.
    """

    def __init__(
        self,
        folder: RunFolder,
        start: int,
        config: CheckpointConfig,
        config_digest: str,
        worker: Worker,
        store: Store,
        logs: tuple[Log, Log],
    ):
        self._folder, self._config, self._digest = folder, config, config_digest
        self._worker, self._store, self._logs = worker, store, logs
        self.newest = start  # rounds of the newest checkpoint that was asked for
        self._kept: dict[int, Kept] = {}
        self._saved: deque[Saved] = deque()
        self._queued: deque[Future] = deque()
        for step in checkpoint.steps(folder):
            if step > start:
                continue
            try:
                manifest = checkpoint.read_manifest(folder, step)
            except checkpoint.Broken:
                continue  # an older one; it is passed over when it is wanted
            self._kept[step] = Kept(manifest["meta"].get("metric"), frozenset(manifest["beside"]))
        store.collect(self._needed())

    def _needed(self) -> set[str]:
        return {name for entry in self._kept.values() for name in entry.beside}

    def save(
        self, step: int, server: Mapping[str, Any], frozen: "Future | Frozen", metric: float | None
    ) -> None:
        """Queue a checkpoint of a state whose last record is the last line of metrics.jsonl.

        Args:
          step: rounds done.
          server: the server's arrays by path; a copy that nobody gives away.
          frozen: the store's part.
          metric: what the best are chosen by; None where nothing was measured.
        """
        self.newest = step
        mark = self._logs[0].mark()
        self._queued.append(self._worker.submit(self._write, step, server, frozen, metric, mark))

    def make_room(self) -> None:
        """Wait while more than one checkpoint is still to be written: each holds a copy of the state."""
        while len(self._queued) > 1:
            self._queued.popleft().result()

    def _write(
        self,
        step: int,
        server: Mapping[str, Any],
        frozen: "Future | Frozen",
        metric: float | None,
        metrics: Mark,
    ) -> None:
        part: Frozen = frozen.result() if isinstance(frozen, Future) else frozen
        values = {**server, **part.arrays}
        arrays = {path: np.asarray(value) for path, value in values.items()}
        began = time.perf_counter()
        for log in self._logs:
            log.sync()
        meta = {
            "config_digest": self._digest,
            "metric": metric,
            "metrics_size": metrics.size,
            **part.meta,
        }
        beside = {self._folder.metrics.name: metrics, **part.beside}
        size = write_checkpoint.save(self._folder, step, arrays, meta, beside)
        self._kept[step] = Kept(metric, frozenset(part.beside))
        stay = choose_kept(self._kept, self._config)
        stay |= write_checkpoint.prune(self._folder, stay)  # with the rows that they need
        self._kept = {step: entry for step, entry in self._kept.items() if step in stay}
        self._store.collect(self._needed())
        self._saved.append(Saved(step, time.perf_counter() - began, size))

    def finished(self) -> list[Saved]:
        """Return what was completed since the last call."""
        found = []
        while self._saved:
            found.append(self._saved.popleft())
        return found

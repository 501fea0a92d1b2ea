"""One run, round after round, up to where a round is handed to the device and from there on.

`Rounds.steps` is a generator: it yields each round as a `Call` and is sent what came of it, so that one
run can be driven alone, and many in step (`run.loop`).
"""

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from h2tune_jax.round import RoundMetrics
from h2tune_jax.run import checkpoint
from h2tune_jax.run.catalog import rate_factor, scale_rates
from h2tune_jax.run.checkpoint import Checkpoint
from h2tune_jax.run.events import Finished, Notice, Observer, RoundDone, Started, tell
from h2tune_jax.run.federation import Federation, client_weights
from h2tune_jax.run.feed import Feed
from h2tune_jax.run.folder import RunFolder, note_data
from h2tune_jax.run.moments import Tested, Tests, last_means, read_tests, run_tests, score
from h2tune_jax.run.notices import announce
from h2tune_jax.run.programs import Programs, copy_tree
from h2tune_jax.run.records import Log, lines_size, plain, read_lines
from h2tune_jax.run.row_store import RowStore
from h2tune_jax.run.sampling import Participants, check_schedule, in_training, participants
from h2tune_jax.run.saving import Saver
from h2tune_jax.run.settings import RunConfig
from h2tune_jax.run.stopping import Stall, follow, stops_early
from h2tune_jax.run.store import DeviceStore, Frozen, Store
from h2tune_jax.run.worker import Worker
from h2tune_jax.types import ClientData, FederationError, RoundState


class RunResult(NamedTuple):
    """What is left of a run."""

    config: RunConfig
    folder: Path | None
    state: RoundState  # `clients` has None for each cohort where a store of rows holds them
    records: list[dict[str, Any]]  # the lines of metrics.jsonl
    reason: str  # "complete", "early stop" or "interrupted"
    final: dict[str, dict[str, dict[str, float | None]]]  # last test: moment, group, metric: mean


class Call(NamedTuple):
    """A round that is ready for the device."""

    round_index: int
    state: RoundState  # clients: the participants
    data: tuple[ClientData, ...]
    ids: Participants
    weights: tuple[np.ndarray, ...]
    hyper: Any


Outcome = tuple[RoundState, RoundMetrics, float | None]
"""What comes of a call: the state, the metrics, and the seconds that compiling took, if any."""


class _Pending(NamedTuple):
    """A round that was handed to the device, and whose metrics are not fetched yet."""

    round_index: int
    ids: Participants
    metrics: RoundMetrics | None  # None: the tests before the first round
    tests: Tests | None
    compile_seconds: float | None


class _Save(NamedTuple):
    """A state to be saved, whose record is not written yet."""

    step: int
    server: dict[str, Any]
    frozen: "Future | Frozen"


class Rounds:
    """One run under way. The state of the federation is in `_server`, and in the store.

    Args:
      federation: on what.
      config: how.
      programs: of the run.
      worker: loads, stores and saves; it may serve several runs.
      folder: where to write, or None.
      config_digest: noted in checkpoints.
      found: the checkpoint to go on from, or None.
      observers: are told what happens.
      stop_before: asked with the number of the round that would come next.
      going_on: told to who interrupts it: how it goes on; None means by `h2tune run --resume`.
    """

    def __init__(
        self,
        federation: Federation,
        config: RunConfig,
        programs: Programs,
        worker: Worker,
        *,
        folder: RunFolder | None,
        config_digest: str,
        found: Checkpoint | None,
        observers: tuple[Observer, ...],
        stop_before: Callable[[int], bool],
        going_on: str | None = None,
    ):
        self.config, self.federation, self.programs = config, federation, programs
        self.worker, self.folder, self.observers = worker, folder, observers
        self._digest, self._found, self._stop_before = config_digest, found, stop_before
        self._going_on = going_on
        self._names = tuple(spec.name for spec in programs.specs)
        counts = tuple(spec.num_clients for spec in programs.specs)
        newcomers = config.evaluation.newcomers
        self._training = in_training(counts, newcomers.count if newcomers else 0, self._names)
        check_schedule(config.sampling, self._names, self._training)
        if folder is not None:
            note_data(folder, dict(zip(self._names, federation.train)))
        self._newcomers = None
        if newcomers is not None:
            self._newcomers = tuple(
                np.arange(train, count, dtype=np.int32)
                for train, count in zip(self._training, counts)
            )
        self._weights = client_weights(config, federation)

        on_device = config.store.kind == "device"
        self._train = Feed(programs, federation.train, on_device=on_device)
        rows = federation.test
        if config.evaluation.split == "validation":
            rows = federation.validation
        if any(entry is None for entry in rows):
            raise FederationError("evaluation.split is 'validation', and a group has no such rows")
        self._test = Feed(programs, rows, on_device=on_device)  # type: ignore[arg-type]
        self.store: Store
        if on_device:
            self.store = DeviceStore(programs)
        else:
            in_files = config.store.kind == "file"
            self.store = RowStore(programs, worker, folder, in_files=in_files)

        self.records: list[dict[str, Any]] = []
        self._stall = Stall()
        self._left_out: set[str] = set()  # groups of which it was said that results were left out
        self._logs: tuple[Log, Log] | None = None
        self._saver: Saver | None = None
        self._whence = ""  # what is said of where it goes on
        self._clock = 0.0

    def close(self) -> None:
        """Close the logs."""
        for log in self._logs or ():
            log.close()

    # Beginning

    def _begin(self) -> int:
        """Start, or go on from the checkpoint: -> the first round."""
        found, keep, keep_timings = self._found, 0, 0
        self._found = None  # its arrays are in use, or on the device
        if found is not None:
            assert self.folder is not None
            like = self.programs.server_shapes()
            server = checkpoint.unflatten(like, found.arrays, ".server")
            self._server = self.programs.place(server)
            self.store.restore(found.arrays, found.meta)
            keep = found.meta["metrics_size"]
            keep_timings = lines_size(self.folder.timings, found.step)
            self.records = read_lines(self.folder.metrics, keep)
            self._whence = f"goes on from the checkpoint of round {found.step}"
        else:
            logs = () if self.folder is None else (self.folder.metrics, self.folder.timings)
            if any(map(read_lines, logs)):
                self._whence = "has no checkpoint to go on from: begins again with the first round"
            self._server = self.programs.start_server()
            self.store.begin(self._server)
        if self.folder is not None:
            self._logs = Log(self.folder.metrics, keep), Log(self.folder.timings, keep_timings)
            self._saver = Saver(
                self.folder,
                0 if found is None else found.step,
                self.config.checkpoints,
                self._digest,
                self.worker,
                self.store,
                self._logs,
            )
        for record in self.records:
            self._stall = follow(self._stall, record, self.config)
            self._left_out |= _rejecting(record).keys()
        return 0 if found is None else found.step

    # One round after the other

    def steps(self) -> Generator[Call, Outcome, RunResult]:
        """Run: yields every round, is sent its outcome, and returns the result."""
        first, total = self._begin(), self.config.rounds
        path = None if self.folder is None else self.folder.path
        tell(self.observers, Started(self.config, self.federation, path, first, total))
        self._clock = time.perf_counter()
        reason, done = "complete", first
        round_number = self.programs.place(np.asarray(first, np.int32))
        if stops_early(self._stall, self.config):
            reason, total = "early stop", first
        if self._whence and first < total:
            self._say(self._whence)
        if first == 0 and self.config.evaluation.before:
            self._flush(_Pending(-1, self._draw(0), None, self._test_now(round_number, 0), None))

        pending: _Pending | None = None
        save: _Save | None = None
        ids, data = self._draw(first), None
        for index in range(first, total):
            if self._stop_before(index):
                reason = "interrupted"
                break
            clients = self.store.take(self._server, ids)
            data = self._load(ids) if data is None else data
            state = RoundState(round_number, self._server, clients)
            state, metrics, compile_seconds = yield self._call(index, state, data, ids)
            round_number, self._server = state.round, state.server
            following = self._draw(index + 1) if index + 1 < total else None
            self.store.put(ids, state.clients, following)
            done = index + 1
            is_last = done == total
            due = self._due(self.config.evaluation.every, done) or is_last
            tests = self._test_now(round_number, index) if due else None
            if pending is not None:
                self._flush(pending, save)
            pending, save = _Pending(index, ids, metrics, tests, compile_seconds), None
            if self._due(self.config.checkpoints.every, done) or is_last:
                save = self._freeze(done)
            data = None if following is None else self._load(following)
            ids = ids if following is None else following
            if due and self.config.stop is not None:
                # Whether there is a next round is in these metrics.
                self._flush(pending, save)
                pending = save = None
                if stops_early(self._stall, self.config):
                    reason = "complete" if is_last else "early stop"
                    break
        if pending is not None:
            self._flush(pending, save)
        return self._finish(reason, done)

    def _due(self, every: int, done: int) -> bool:
        return every > 0 and done % every == 0

    def _draw(self, index: int) -> Participants:
        return participants(
            self.config.sampling,
            names=self._names,
            counts=self._training,
            weights=self._weights,
            seed=self.config.seed,
            round_index=index,
        )

    def _load(self, ids: Participants) -> tuple:
        return tuple(self._train.take(cohort, chosen) for cohort, chosen in enumerate(ids))

    def _call(self, index: int, state: RoundState, data: tuple, ids: Participants) -> Call:
        factor = rate_factor(self.config.schedule, index, self.config.rounds)
        hyper = scale_rates(self.programs.method.hyper, factor)
        weights = tuple(weight[chosen] for weight, chosen in zip(self._weights, ids))
        return Call(index, state, data, ids, weights, hyper)

    def _test_now(self, round_number: Any, index: int) -> Tests:
        """Hand the tests of the present state to the device."""
        everyone = tuple(np.arange(count, dtype=np.int32) for count in self._training)
        chosen = self._draw(index) if self.config.evaluation.clients == "participants" else everyone
        return run_tests(
            self.programs,
            self.config.evaluation,
            self.store,
            round_number,
            self._server,
            Tested(chosen, self._newcomers),
            self._test,
            self._train,
        )

    def _say(self, text: str, level: str = "info") -> None:
        announce(self.folder, self.observers, Notice(text, level))

    # What a round leaves behind

    def _flush(self, pending: _Pending, save: "_Save | None" = None) -> None:
        """Wait for a round's metrics, write them down, and let its checkpoint be written."""
        record = self._record(pending)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self.worker.check()
        self.records.append(record)
        self._stall = follow(self._stall, record, self.config)
        timing: dict[str, Any] = {"round": pending.round_index, "seconds": seconds}
        if pending.metrics is not None:
            timing["clients_per_second"] = sum(map(len, pending.ids)) / seconds
        if pending.compile_seconds is not None:
            timing["compile_seconds"] = pending.compile_seconds
        timing["wall"] = time.time()
        if self._logs is not None:
            for log, line in zip(self._logs, (record, timing)):
                log.append(line)
        tell(self.observers, RoundDone(record, timing))
        self._say_who_is_left_out(record)
        if save is not None:
            self._save(save)
        self._tell_saved()

    def _record(self, pending: _Pending) -> dict[str, Any]:
        record: dict[str, Any] = {
            "round": pending.round_index,
            "cohorts": {},
            "server": {},
            "bytes_up": 0,
            "bytes_down": 0,
        }
        if pending.metrics is not None:
            metrics = jax.device_get(pending.metrics)
            record["server"] = plain(dict(metrics.server))
            for spec, ids in zip(self.programs.specs, pending.ids):
                seen = dict(metrics.clients[spec.name])
                if not seen:  # nobody of this cohort took part
                    continue
                for way in ("up", "down"):
                    record[f"bytes_{way}"] += int(seen.pop(f"bytes_{way}").sum(dtype=np.int64))
                    del seen[f"numbers_{way}"]
                del seen["finite"]
                rejected = int(metrics.rejected[spec.name])
                record["cohorts"][spec.name] = {
                    "clients": plain(ids),
                    **plain(seen),
                    "rejected": rejected,
                }
        if pending.tests is not None:
            record["evaluation"] = read_tests(pending.tests)
        return record

    def _say_who_is_left_out(self, record: dict[str, Any]) -> None:
        for name, count in _rejecting(record).items():
            if name not in self._left_out:
                self._left_out.add(name)
                self._say(
                    f"group {name!r}: {count} of {len(record['cohorts'][name]['clients'])} results of "
                    f"round {record['round']} are not finite, and were left out; this is said once, "
                    "metrics.jsonl counts them under 'rejected'",
                    "warning",
                )

    def _freeze(self, done: int) -> "_Save | None":
        if self._saver is None:
            return None
        self._saver.make_room()
        server = checkpoint.flatten(copy_tree(self._server), ".server")
        return _Save(done, server, self.store.freeze())

    def _save(self, save: _Save) -> None:
        assert self._saver is not None
        wanted, moment = self.config.checkpoints.metric, self.config.evaluation.moments[0]
        metric = score(self.records[-1], wanted, moment)
        self._saver.save(save.step, save.server, save.frozen, metric)

    def _tell_saved(self) -> None:
        for event in () if self._saver is None else self._saver.finished():
            tell(self.observers, event)

    def _finish(self, reason: str, done: int) -> RunResult:
        saver, path = self._saver, None
        if saver is not None:
            assert self.folder is not None
            path = self.folder.path
            if saver.newest < done:
                last = self._freeze(done)
                assert last is not None
                self._save(last)
            self.worker.submit(lambda: None).result()  # behind everything else
            self._tell_saved()
            if reason == "interrupted":
                command = f"h2tune run {self.folder.config} --out {path} --resume"
                self._say(
                    f"interrupted after {done} rounds; go on with: {self._going_on or command}"
                )
        self.worker.check()
        clients = (None,) * len(self.programs.specs)
        if isinstance(self.store, DeviceStore):
            clients = self.store.clients
        state = RoundState(jax.numpy.asarray(done, jax.numpy.int32), self._server, clients)
        tell(self.observers, Finished(reason, done, path))
        return RunResult(self.config, path, state, self.records, reason, last_means(self.records))


def _rejecting(record: dict[str, Any]) -> dict[str, int]:
    """Return the groups of which a round left out results, and how many."""
    counts = {name: seen.get("rejected", 0) for name, seen in record["cohorts"].items()}
    return {name: count for name, count in counts.items() if count}

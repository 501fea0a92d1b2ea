"""Runs from the first round to the last: alone, or several seeds in step.

The device never waits for the shell: round t + 1 is handed to it before the metrics of round t are
fetched, and while round t computes, the clients and the data of round t + 1 are made ready. A run that
was interrupted anywhere repeats the uninterrupted one bit for bit: what a round does depends on config,
seed, round and state alone, and the logs are cut back to where the checkpoint stood.
"""

import contextlib
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from h2tune_jax.method import FederatedMethod
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.config import config_digest, config_toml
from h2tune_jax.run.disk import RunError
from h2tune_jax.run.events import Notice, Observer
from h2tune_jax.run.federation import Federation, build_federation, format_cut
from h2tune_jax.run.folder import (
    RunFolder,
    begin_folder,
    holds_run,
    lock_folder,
    read_facts,
)
from h2tune_jax.run.moments import last_means, score
from h2tune_jax.run.notices import announce
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.records import plain
from h2tune_jax.run.rounds import Call, Outcome, Rounds, RunResult
from h2tune_jax.run.saving import resume_point
from h2tune_jax.run.settings import RunConfig
from h2tune_jax.run.stopping import has_stalled
from h2tune_jax.run.worker import Worker

__all__ = [
    "RunResult",
    "StopRequest",
    "has_stalled",
    "last_means",
    "run_rounds",
    "score",
    "simulate",
]

StopRequest = Callable[[], bool]
"""Asked between rounds; True ends the run after the present one, with a checkpoint."""


def simulate(
    config: RunConfig,
    *,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    observers: Sequence[Observer] = (),
    federation: Federation | None = None,
    method: FederatedMethod | None = None,
    stop_request: StopRequest | None = None,
    programs: Programs | None = None,
) -> RunResult:
    """Run a federation.

    Args:
      config: what to run.
      out: the run's folder; None keeps everything in memory and writes nothing.
      resume: go on from the newest checkpoint that verifies, if the folder holds a run of this config.
      observers: are told what happens; see `run.events`.
      federation: what `build_federation(config)` gives, where the caller has it already.
      method: likewise, of `build_method(config)`.
      stop_request: see `StopRequest`.
      programs: as in `run_rounds`.

    Raises `FederationError` for what cannot be run, and `RunError` where the folder is the matter.
    """
    method = build_method(config) if method is None else method
    with open_folder(config, out, resume=resume) as begin:
        federation = build_federation(config) if federation is None else federation
        folder, notices = begin(federation)
        return run_rounds(
            method,
            federation,
            config,
            folder=folder,
            observers=observers,
            stop_request=stop_request,
            notices=notices,
            programs=programs,
        )


Begin = Callable[..., tuple[RunFolder | None, list[str]]]


@contextlib.contextmanager
def open_folder(
    config: RunConfig, out: str | os.PathLike | None, *, resume: bool
) -> Iterator[Begin]:
    """Lock a run's folder, and give what writes its first files: (federation, **notes) -> (it, notices).

    What cannot be is refused before anything is loaded.
    """
    if out is None:
        yield lambda federation, **notes: (None, [])
        return
    folder = RunFolder(Path(out))

    def begin(federation: Federation, **notes: Any) -> tuple[RunFolder, list[str]]:
        groups = [
            {
                "name": group.name,
                "task": group.task,
                "majority": plain(group.majority),
                "num_clients": len(group.client_names),
            }
            for group in federation.groups
        ]
        facts = {
            "name": config.name,
            "seed": config.seed,
            "method": config.method.name,
            "groups": groups,
            **notes,
        }
        digest = config_digest(config)
        said = begin_folder(folder, config_toml(config), digest, facts, resume=resume)
        beside = read_facts(folder).get("together", [config.seed])
        if beside != notes.get("together", [config.seed]):
            said.append(
                f"was begun together with the seeds {beside}; with others beside it, or none, it may "
                "differ in the last bits"
            )
        return folder, said

    with lock_folder(folder):
        if holds_run(folder.path) and not resume:
            raise RunError(
                f"{folder.path} holds a run already; resume it (--resume), or choose another folder"
            )
        yield begin


def run_rounds(
    method: FederatedMethod,
    federation: Federation,
    config: RunConfig,
    *,
    folder: RunFolder | None = None,
    observers: Sequence[Observer] = (),
    stop_request: StopRequest | None = None,
    notices: Sequence[str] = (),
    programs: Programs | None = None,
) -> RunResult:
    """Run the rounds of a federation that need not come from the config.

    Of `config` the groups' models, tasks and budgets are not looked at.

    Args:
      method: what to run.
      federation: on what.
      config: how.
      folder: where to write, its lock held and its run.json written (`simulate` does both); goes on from
        the newest checkpoint in it. None writes nothing.
      observers: are told what happens.
      stop_request: see `StopRequest`.
      notices: announced first; see `run.notices`.
      programs: those of an earlier run of the same method, specs, bases and config, compiled already.
    """
    if programs is None:
        programs = Programs(method, federation.specs, federation.bases, federation.probe, config)
    for text in notices:
        announce(folder, tuple(observers), Notice(text, "warning"), once=True)
    stop_before = lambda index: stop_request is not None and stop_request()
    with contextlib.ExitStack() as stack:
        worker = Worker()
        stack.callback(worker.close)
        rounds = make_rounds(federation, config, programs, worker, folder, observers, stop_before)
        stack.callback(rounds.close)
        stack.callback(worker.close)  # called first: what is queued writes to the logs
        (result,) = drive([rounds.steps()], lambda calls: {0: run_one(programs, calls[0])})
        return result


def make_rounds(
    federation: Federation,
    config: RunConfig,
    programs: Programs,
    worker: Worker,
    folder: RunFolder | None,
    observers: Sequence[Observer],
    stop_before: Callable[[int], bool],
    at_most: int | None = None,
    going_on: str | None = None,
) -> Rounds:
    """Set a run up, its folder's lock held; `at_most` as in `resume_point`, `going_on` as in `Rounds`."""
    cuts = [(group.name, format_cut(group.cut)) for group in federation.groups]
    if any(cut for _, cut in cuts):
        text = "; ".join(f"group {name!r}: {cut}" for name, cut in cuts if cut)
        announce(folder, tuple(observers), Notice(text), once=True)
    found, digest = None, ""
    if folder is not None:
        digest = config_digest(config)
        found, said = resume_point(folder, digest, at_most)
        for notice in said:
            announce(folder, tuple(observers), notice)
    return Rounds(
        federation,
        config,
        programs,
        worker,
        folder=folder,
        config_digest=digest,
        found=found,
        observers=tuple(observers),
        stop_before=stop_before,
        going_on=going_on,
    )


def run_one(programs: Programs, call: Call) -> Outcome:
    """Hand one run's round to the device."""
    began = time.perf_counter()
    state, metrics = programs.run_round(
        call.state,
        programs.bases,
        call.data,
        call.ids,
        call.weights,
        call.hyper,
        programs.seed,
        programs.probe,
    )
    # A call that has nothing to compile returns before the round is computed.
    compile_seconds = programs.compile_seconds(tuple(map(len, call.ids)), began)
    return state, metrics, compile_seconds


def drive(
    runs: Sequence[Generator[Call, Outcome, RunResult]],
    hand: Callable[[dict[int, Call]], Mapping[int, Outcome]],
) -> list[RunResult]:
    """Drive runs in step: `hand` is given the calls of equal round, by the run's place."""
    calls: dict[int, Call] = {}
    results: dict[int, RunResult] = {}

    def advance(place: int, outcome: Any) -> None:
        try:
            calls[place] = runs[place].send(outcome)
        except StopIteration as end:
            results[place] = end.value

    for place in range(len(runs)):
        advance(place, None)
    while calls:
        earliest = min(call.round_index for call in calls.values())
        ready = [place for place, call in sorted(calls.items()) if call.round_index == earliest]
        for place, outcome in hand({place: calls.pop(place) for place in ready}).items():
            advance(place, outcome)
    return [results[place] for place in range(len(runs))]

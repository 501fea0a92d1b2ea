"""Several seeds of one config as one program: each round of all of them is one call to the device.

Each seed is a whole run with a folder of its own, and all but the rounds is done for each by itself. The
bits of a seed depend on which seeds ran beside it (a batched product sums in another order), so run.json
notes them, and a set that is interrupted is gone on with as a set.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.method import FederatedMethod
from h2tune_jax.run import checkpoint
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.events import Notice, Observer
from h2tune_jax.run.federation import Federation, build_federation
from h2tune_jax.run.loop import StopRequest, drive, make_rounds, open_folder, run_one
from h2tune_jax.run.notices import announce
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.rounds import Call, Outcome, RunResult
from h2tune_jax.run.settings import RunConfig
from h2tune_jax.run.stopping import is_finished
from h2tune_jax.run.worker import Worker
from h2tune_jax.types import FederationError, PyTree, RoundState

APART = (
    "the seeds have no checkpoint of one round that verifies for all of them: each goes on from its own, "
    "and may differ in the last bits from a set that was not interrupted"
)


def simulate_seeds(
    config: RunConfig,
    seeds: Sequence[int],
    outs: Sequence[str | os.PathLike] | None = None,
    *,
    resume: bool = False,
    observers: Sequence[Sequence[Observer]] = (),
    federations: Sequence[Federation] | None = None,
    method: FederatedMethod | None = None,
    stop_request: StopRequest | None = None,
    programs: Programs | None = None,
) -> list[RunResult]:
    """Run one config with several seeds at once: -> their results, in order.

    Needs store "device" on one device, and room for all states at once.

    Args:
      config: what to run; its own seed is not used.
      seeds: each once.
      outs: a folder for each; None writes nothing.
      resume: go on with those that were begun. Seeds that are finished do not run again.
      observers: for each seed those that are told of its run; () for none.
      federations: what `build_federation` gives for each seed, where the caller has them already.
      method: what `build_method` gives, likewise.
      stop_request: see `run.loop`.
      programs: those of an earlier call with the same method, specs, bases and config.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise FederationError(f"seeds: expected one or more, each once, got {list(seeds)}")
    if config.store.kind != "device" or config.engine.devices not in (None, 1):
        raise FederationError("seeds run together with store 'device' on one device only")
    configs = [config.model_copy(update={"seed": seed}) for seed in seeds]
    homes = [None] * len(seeds) if outs is None else [Path(out) for out in outs]
    watching = [tuple(observers[i]) if observers else () for i in range(len(seeds))]
    method = build_method(config) if method is None else method
    with contextlib.ExitStack() as stack:
        begins = [
            stack.enter_context(open_folder(own, home, resume=resume))
            for own, home in zip(configs, homes)
        ]
        if federations is None:
            federations = _build_all(configs)
        reason = why_apart(federations)
        if reason is not None:
            raise FederationError(reason)
        folders = []
        for begin, federation, told in zip(begins, federations, watching):
            folder, said = begin(federation, together=list(seeds))
            for text in said:
                announce(folder, told, Notice(text, "warning"), once=True)
            folders.append(folder)
        give_up, apart = meeting_points(configs, homes)
        for folder, told in zip(folders, watching):
            if apart:
                announce(folder, told, Notice(APART, "warning"))

        first = federations[0]
        if programs is None:
            programs = Programs(method, first.specs, first.bases, first.probe, configs[0])
        lanes = [
            programs.with_seed(own.seed, federation.probe)
            for own, federation in zip(configs, federations)
        ]
        stops = _same_answer(stop_request)
        going_on = f"the same seeds together ({', '.join(map(str, seeds))})"
        worker, rounds = Worker(), []
        stack.callback(worker.close)
        for lane, own, federation, folder, told, at_most in zip(
            lanes, configs, federations, folders, watching, give_up
        ):
            made = make_rounds(
                federation, own, lane, worker, folder, told, stops, at_most, going_on
            )
            stack.callback(made.close)
            rounds.append(made)
        stack.callback(worker.close)  # called first: what is queued writes to the logs
        together = programs.made("together", lambda: _together(programs.run_round))
        hand = functools.partial(_hand, lanes, together)
        return drive([made.steps() for made in rounds], hand)


def _build_all(configs: Sequence[RunConfig]) -> list[Federation]:
    """Build every seed's federation on one copy of the frozen weights."""
    built: list[Federation] = []
    for config in configs:
        federation = build_federation(config)
        if built and _equal(federation.bases, built[0].bases):
            federation = federation._replace(bases=built[0].bases)
        built.append(federation)
    return built


def why_apart(federations: Sequence[Federation]) -> str | None:
    """Say why seeds cannot run together; None where they can."""
    first = federations[0]
    shapes = lambda federation: jax.tree.map(np.shape, (federation.train, federation.probe))
    for other in federations[1:]:
        if other.specs != first.specs:
            return "seeds run together only where their groups are alike"
        if other.bases is not first.bases and not _equal(other.bases, first.bases):
            return "seeds run together only on the same frozen weights"
        if shapes(other) != shapes(first):
            return (
                "seeds run together only where clients have room for equally many examples, which a "
                "partition drawn from the seed does not give"
            )
    return None


def _equal(one: PyTree, other: PyTree) -> bool:
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
    return all(a is b or np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def meeting_points(
    configs: Sequence[RunConfig], homes: Sequence[Path | None]
) -> tuple[list[int | None], bool]:
    """Find where seeds go on in step: -> (for each the round whose later checkpoints it gives up, apart).

    A kill between the saves of two seeds leaves one of them a checkpoint ahead, and damage leaves one
    behind: they meet at the newest round of which all unfinished seeds have a checkpoint that verifies.
    Where there is none they are apart: each keeps what it has, and those behind catch up by themselves.
    A finished seed goes back only to a checkpoint that it has, else it keeps all (None): it never
    begins anew.
    """
    held = [[] if home is None else checkpoint.steps(home) for home in homes]
    finished = [
        home is not None and bool(steps) and is_finished(home, config)
        for config, home, steps in zip(configs, homes, held)
    ]
    pending = [(home, steps) for home, steps, is_done in zip(homes, held, finished) if not is_done]
    shared = set.intersection(*(set(steps) for _, steps in pending)) if pending else set()
    common = next((s for s in sorted(shared, reverse=True) if _verify_all(pending, s)), None)
    if common is None and _may_begin_again(pending, configs[0].checkpoints.every):
        common = 0

    def point(home: Path | None, steps: list[int], is_done: bool) -> int | None:
        if not is_done or home is None or common is None:
            return common
        if common not in steps or checkpoint.find_damage(home, common) is not None:
            return None
        return common

    points = [point(*each) for each in zip(homes, held, finished)]
    return points, common is None and bool(pending)


_Held = tuple[Path | None, list[int]]


def _verify_all(pending: Sequence[_Held], step: int) -> bool:
    return all(home is None or checkpoint.find_damage(home, step) is None for home, _ in pending)


def _may_begin_again(pending: Sequence[_Held], every: int) -> bool:
    """Say whether a seed has no checkpoint yet, and the others no more than their first, unharmed."""
    if all(steps for _, steps in pending):
        return False
    first = [(home, steps) for home, steps in pending if steps]
    return all(
        steps[-1] <= every and home is not None and checkpoint.find_damage(home, steps[-1]) is None
        for home, steps in first
    )


def _same_answer(stop_request: StopRequest | None) -> Callable[[int], bool]:
    """Ask once a round, and give every seed the same answer."""
    answers: dict[int, bool] = {}

    def stops(round_index: int) -> bool:
        if stop_request is None:
            return False
        if round_index not in answers:
            answers[round_index] = stop_request()
        return answers[round_index]

    return stops


def _together(run_round: Callable) -> Callable[..., list[tuple[RoundState, Any]]]:
    """Build the round of several seeds: everything but hyper and bases comes as a list, one a seed."""

    def run(states, bases, data, ids, weights, hyper, seeds, probes):
        stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        # Not mapped: a mapped round number would turn branches on it into selects that run both.
        number = states[0].round

        def one(server, clients, *rest):
            data, ids, weights, seed, probe = rest
            state = RoundState(number, server, clients)
            return run_round(state, bases, data, ids, weights, hyper, seed, probe)

        state, metrics = jax.vmap(one)(
            stack([state.server for state in states]),
            stack([state.clients for state in states]),
            stack(data),
            stack(ids),
            stack(weights),
            seeds,
            stack(probes),
        )
        out = []
        for lane in range(len(states)):
            server, clients, seen = jax.tree.map(
                lambda leaf, lane=lane: leaf[lane], (state.server, state.clients, metrics)
            )
            out.append((RoundState(number + 1, server, clients), seen))
        return out

    return jax.jit(run, donate_argnums=0)


def _hand(
    lanes: Sequence[Programs], together: Callable, calls: dict[int, Call]
) -> dict[int, Outcome]:
    if len(calls) == 1:
        return {place: run_one(lanes[place], call) for place, call in calls.items()}
    places, ready = list(calls), list(calls.values())
    programs, began = lanes[places[0]], time.perf_counter()
    outcomes = together(
        [call.state for call in ready],
        programs.bases,
        [call.data for call in ready],
        [call.ids for call in ready],
        [call.weights for call in ready],
        ready[0].hyper,
        np.stack([lanes[place].seed for place in places]),
        [lanes[place].probe for place in places],
    )
    shape = len(places), *map(len, ready[0].ids)
    compiled = programs.compile_seconds(("together", *shape), began)
    return {
        place: (state, metrics, compiled)
        for place, (state, metrics) in zip(places, outcomes, strict=True)
    }

"""When a run is over: its last round, or an early stop."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from h2tune_jax.run import checkpoint
from h2tune_jax.run.config import config_digest
from h2tune_jax.run.disk import RunError
from h2tune_jax.run.folder import RunFolder, holds_run, read_facts
from h2tune_jax.run.moments import score
from h2tune_jax.run.records import read_lines
from h2tune_jax.run.settings import RunConfig, StopConfig


class Stall(NamedTuple):
    """What an early stop has to know of the tests so far, however many there were."""

    best: float | None = None  # higher is better, whatever the mode
    waited: int = 0  # tests since


def has_stalled(scores: Sequence[float | None], stop: StopConfig) -> bool:
    """Say whether the last `patience` scores have not got better than the best before by `min_delta`."""
    stall = functools.reduce(lambda stall, value: _after_test(stall, value, stop), scores, Stall())
    return stall.waited >= stop.patience


def _after_test(stall: Stall, value: float | None, stop: StopConfig) -> Stall:
    gained = None if value is None else value if stop.mode == "max" else -value
    if gained is not None and (stall.best is None or gained > stall.best + stop.min_delta):
        return Stall(gained)
    return stall._replace(waited=stall.waited + 1)


def follow(stall: Stall, record: dict[str, Any], config: RunConfig) -> Stall:
    """Take a further record into account."""
    if config.stop is None or "evaluation" not in record:
        return stall
    value = score(record, config.stop.metric, config.evaluation.moments[0])
    return _after_test(stall, value, config.stop)


def stops_early(stall: Stall, config: RunConfig) -> bool:
    """Say whether the early stop of a config, if it has one, has come."""
    return config.stop is not None and stall.waited >= config.stop.patience


def is_finished(folder: str | Path, config: RunConfig) -> bool:
    """Say whether a folder holds a run of this config that came to its end.

    Raises `RunError` where it holds a run of another config: nothing of that is overwritten.
    """
    if not holds_run(folder):
        return False
    home = RunFolder(Path(folder))
    if read_facts(home).get("config_digest") != config_digest(config):
        raise RunError(
            f"{folder} holds a run of another config; compare into another folder, or remove it"
        )
    records = read_lines(home.metrics)
    done = records[-1]["round"] + 1 if records else 0
    # What is killed behind the last round still has a checkpoint to write.
    if not records or checkpoint.steps(home)[-1:] != [done]:
        return False
    stall = functools.reduce(lambda stall, record: follow(stall, record, config), records, Stall())
    return done == config.rounds or stops_early(stall, config)

"""When a run is over: its last round, or an early stop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from h2tune_jax.run import checkpoint
from h2tune_jax.run.config import config_digest
from h2tune_jax.run.disk import RunError
from h2tune_jax.run.folder import RunFolder, holds_run, read_facts
from h2tune_jax.run.moments import score
from h2tune_jax.run.records import read_lines
from h2tune_jax.run.settings import RunConfig, StopConfig


def has_stalled(scores: Sequence[float | None], stop: StopConfig) -> bool:
    """Say whether the last `patience` scores have not got better than the best before by `min_delta`."""
    sign = 1 if stop.mode == "max" else -1
    best, waited = None, 0
    for value in scores:
        gained = None if value is None else sign * value
        if gained is not None and (best is None or gained > best + stop.min_delta):
            best, waited = gained, 0
        else:
            waited += 1
    return waited >= stop.patience


def stops_early(records: Sequence[dict[str, Any]], config: RunConfig) -> bool:
    """Say whether the early stop of a config, if it has one, comes after these records."""
    if config.stop is None:
        return False
    moment = config.evaluation.moments[0]
    scores = [score(r, config.stop.metric, moment) for r in records if "evaluation" in r]
    return has_stalled(scores, config.stop)


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
    return done == config.rounds or stops_early(records, config)

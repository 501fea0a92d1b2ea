"""A run's records as named scalars, and the observer that writes them somewhere."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from h2tune_jax.run.events import Event, Finished, Observer, RoundDone, Started


def scalars_of(record: Mapping[str, Any], timing: Mapping[str, Any]) -> dict[str, float]:
    """Name what a round gave; values of clients are averaged over those that have one.

        train/GROUP/METRIC          over the clients that took part
        MOMENT/GROUP/METRIC         of an evaluation
        server/METRIC, bytes/up, bytes/down, time/seconds, time/clients_per_second

    What is not a finite number is left out.
    """
    found: dict[str, Any] = {}
    for group, cohort in record.get("cohorts", {}).items():
        for metric, value in cohort.items():
            if metric != "clients":
                found[f"train/{group}/{metric}"] = value
    for moment, groups in record.get("evaluation", {}).items():
        for group, metrics in groups.items():
            for metric, value in metrics.items():
                if metric != "clients":
                    found[f"{moment}/{group}/{metric}"] = value
    for metric, value in record.get("server", {}).items():
        found[f"server/{metric}"] = value
    for way in ("up", "down"):
        found[f"bytes/{way}"] = record.get(f"bytes_{way}")
    for name in ("seconds", "clients_per_second"):
        found[f"time/{name}"] = timing.get(name)
    means = {name: _mean(value) for name, value in found.items()}
    return {name: value for name, value in means.items() if value is not None}


def _mean(value: Any) -> float | None:
    values = value if isinstance(value, list | tuple) else [value]
    known = [v for v in values if isinstance(v, bool | int | float) and np.isfinite(v)]
    return float(np.mean(known)) if known else None


def scalar_observer(
    what: str,
    *,
    begin: Callable[[Started], None],
    write: Callable[[dict[str, float], int], None],
    end: Callable[[], None],
) -> Observer:
    """Build an observer that writes every round's scalars, by the number of rounds done.

    What `begin` raises stops the run before its first round. Later errors (a full disk, a network that
    went away) end the writing, and are said on standard error once: they don't end the run.
    """
    broken = False

    def observe(event: Event) -> None:
        nonlocal broken
        if isinstance(event, Started):
            begin(event)
            return
        if broken:
            return
        try:
            if isinstance(event, RoundDone):
                write(scalars_of(event.record, event.timing), event.record["round"] + 1)
            elif isinstance(event, Finished):
                end()
        except Exception as error:
            broken = True
            print(f"{what} stopped, the run goes on: {error!r}", file=sys.stderr)

    return observe

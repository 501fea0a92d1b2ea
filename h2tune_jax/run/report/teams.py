"""How the runs of a report are put together: by group of clients, by method, by colour."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from h2tune_jax.run.report.view import Curve, GroupView, RunView, curve, metric_of


class Team(NamedTuple):
    """What is drawn in one colour: the runs of one method, which differ by seed; or one run."""

    name: str
    colour: int
    runs: tuple[RunView, ...]


def teams_of(views: Sequence[RunView]) -> list[Team]:
    """Put runs together by method where there are several methods, else leave each by itself."""
    methods = list(dict.fromkeys(view.method for view in views))
    found: list[tuple[str, tuple[RunView, ...]]] = []
    for method in methods:
        runs = tuple(view for view in views if view.method == method)
        # Two runs of one seed differ in something else, which no mean may hide.
        same = len({view.seed for view in runs}) < len(runs)
        if same or (len(methods) == 1 and len(views) <= 6):
            found += [(view.label, (view,)) for view in runs]
        else:
            found.append((method if len(runs) > 1 else next(iter(runs)).label, runs))
    return [Team(name, colour, runs) for colour, (name, runs) in enumerate(found)]


def groups_of(views: Sequence[RunView]) -> tuple[GroupView, ...]:
    """List the groups of all runs, by name; what one run does not know of a group another may."""
    found: dict[str, GroupView] = {}
    for view in views:
        for group in view.groups:
            known = found.get(group.name)
            if known is None or known.majority is None:
                found[group.name] = group
    return tuple(found.values())


def last_values(team: Team, group: GroupView, moment: str) -> tuple[str | None, np.ndarray]:
    """Read each client's metric at the last evaluation, averaged over the team's runs: (name, [C])."""
    rows = []
    metric = next((m for view in team.runs if (m := metric_of(view, group.name))), None)
    for view in team.runs:
        found = None if metric is None else curve(view, group.name, metric, moment)
        if found is not None and len(found.rounds):
            row = np.full(max(len(group.clients), found.clients[-1] + 1), np.nan)
            row[found.clients] = found.values[-1]
            rows.append(row)
    return (metric, nan_mean(np.stack(rows), axis=0)) if rows else (None, np.zeros(0))


def mean_over_runs(found: Sequence[Curve]) -> tuple[list[int], list[float]]:
    """Average the runs' means, in the rounds that all of them have."""
    means = [dict(zip(one.rounds.tolist(), one.mean.tolist())) for one in found]
    rounds = sorted(set.intersection(*(set(mean) for mean in means)))
    return rounds, [float(np.mean([mean[r] for mean in means])) for r in rounds]


def nan_mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Average what is known; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.asarray(np.nanmean(values, axis=axis))

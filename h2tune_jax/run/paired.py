"""Methods compared over seeds, paired: a seed with one method minus the same seed with another.

The interval is that of the paired t-test at 95 %: mean difference +- t(0.975, n - 1) s / sqrt(n), over
n seeds. It takes differences between seeds for normally distributed, and says nothing for one seed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

OVERALL = "all groups"


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval; None where there are fewer than two seeds."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


class Score(NamedTuple):
    """What one finished run ended with: by group, the metric's name and its mean over clients."""

    method: str
    seed: int
    values: Mapping[str, tuple[str, float]]


class ComparisonRow(NamedTuple):
    """One method in one group (or over all of them)."""

    group: str
    metric: str
    method: str
    mean: float  # over the seeds that this method has
    spread: float | None  # standard deviation over them; None for one seed
    seeds: tuple[int, ...]
    difference: Interval | None  # to the baseline, over the seeds that both have; None for itself


class Comparison(NamedTuple):
    """Every method against the baseline, by group and overall."""

    baseline: str
    methods: tuple[str, ...]
    rows: tuple[ComparisonRow, ...]
    scores: tuple[Score, ...]


def paired_interval(differences: Sequence[float]) -> Interval:
    """Return the mean of paired differences and its 95 % interval by Student's t."""
    values = np.asarray(differences, np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    # jax brings scipy along; it takes a moment to import, and most commands never compare.
    from scipy.special import stdtrit

    reach = float(stdtrit(count - 1, 0.975)) * float(values.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - reach, mean + reach, count)


def compare_scores(scores: Sequence[Score], baseline: str | None = None) -> Comparison:
    """Compare methods by their scores.

    Args:
      scores: one a run. Of several with the same method and seed the last counts.
      baseline: whom to compare with; None means `local` where it was run, else the first method.

    Returns:
      Rows by group, then the mean over the groups (each weighs the same) where all groups of all runs
      are measured by one metric. Seeds that only one of two methods has are left out of their difference.
    """
    methods = tuple(dict.fromkeys(score.method for score in scores))
    if baseline is None:
        baseline = "local" if "local" in methods else methods[0]
    cells = {(score.method, score.seed): score.values for score in scores}
    groups = list(dict.fromkeys(group for score in scores for group in score.values))
    names = {metric for score in scores for metric, _ in score.values.values()}
    if len(names) == 1 and len(groups) > 1:
        metric = names.pop()
        for key, values in cells.items():
            if len(values) == len(groups):
                mean = sum(value for _, value in values.values()) / len(values)
                cells[key] = {**values, OVERALL: (metric, mean)}
        groups.append(OVERALL)

    rows = []
    for group in groups:
        found = {key: values[group] for key, values in cells.items() if group in values}
        for method in methods:
            own = {seed: pair for (name, seed), pair in found.items() if name == method}
            if not own:
                continue
            metric = next(iter(own.values()))[0]
            values = np.asarray([value for _, value in own.values()], np.float64)
            shared = [seed for seed in own if found.get((baseline, seed), ("",))[0] == metric]
            gaps = [own[seed][1] - found[baseline, seed][1] for seed in shared]
            rows.append(
                ComparisonRow(
                    group=group,
                    metric=metric,
                    method=method,
                    mean=float(values.mean()),
                    spread=float(values.std(ddof=1)) if len(values) > 1 else None,
                    seeds=tuple(sorted(own)),
                    difference=paired_interval(gaps) if gaps and method != baseline else None,
                )
            )
    return Comparison(baseline, methods, tuple(rows), tuple(scores))

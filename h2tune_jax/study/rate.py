"""Is a claimed rate consistent with what was measured?

A claim O(T^-p) is an upper bound. Two things are asked of M(T), the mean over seeds, at the last four
horizons, each with the interval of a bootstrap over seeds:

    slope    of the least-squares line of log M on log T: the interval lies at or below -p + 0.05;
    growth   of T^p M(T) over the last doubling of T, as an exponent: the interval lies at or below 0.1,
             so that T^p M(T) is bounded as far as can be seen.

The slope catches a curve that falls too slowly, the growth one that fell and is flattening out. All runs of
these horizons have to be finite, with no client's result refused.
"""

from typing import NamedTuple

import numpy as np

from h2tune_jax.types import FederationError


class Claim(NamedTuple):
    """What is claimed, and what counts as consistent with it."""

    exponent: float = 0.5  # p
    slack: float = 0.05  # the slope may be so much flatter
    growth: float = 0.1  # the largest growth exponent of T^p M(T) over the last doubling
    last: int = 4  # horizons that are looked at
    level: float = 0.95
    draws: int = 2000  # of the bootstrap


SQRT = Claim()
"""The O(1/sqrt T) of the theorem."""


LEAST_SEEDS = 4
"""How many seeds a verdict needs; the intervals of so few are somewhat too narrow."""


class Interval(NamedTuple):
    """An estimate and its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Verdict(NamedTuple):
    """Whether the data are consistent with the claim, and why not."""

    consistent: bool
    slope: Interval
    growth: Interval
    reason: str  # "" where consistent


NOTHING = Interval(np.nan, np.nan, np.nan)


def judge(
    horizons: np.ndarray,  # i64[H], ascending
    values: np.ndarray,  # [H, seeds], not negative
    claim: Claim = SQRT,
    *,
    rejected: np.ndarray | None = None,  # [H, seeds], client results that were not finite
) -> Verdict:
    """Hold measured values against a claim.

    Seeds are drawn together for all horizons, as a seed's runs at different horizons are alike. Raises
    `FederationError` where there are too few of either: no verdict at all.
    """
    if len(horizons) < claim.last:
        raise FederationError(f"a verdict needs {claim.last} horizons, there are {len(horizons)}")
    check_seeds(values.shape[1])
    if np.any(np.diff(horizons) <= 0):
        raise FederationError(f"horizons must ascend, got {list(horizons)}")
    horizons, values = horizons[-claim.last :], values[-claim.last :]
    refused = 0 if rejected is None else int(rejected[-claim.last :].sum())
    if refused or not np.isfinite(values).all():
        return _inconsistent(f"runs diverged ({refused} client results were not finite)")
    if (values.mean(axis=1) <= 0).any():
        return _inconsistent("a mean that is not positive has no logarithm")

    slope, growth = _intervals(horizons, values, claim)
    limit = claim.slack - claim.exponent
    reasons = []
    if not slope.high <= limit:
        reasons.append(f"slope {slope} is not shown to be at most {limit:.2f}")
    if not growth.high <= claim.growth:
        reasons.append(f"T^{claim.exponent:g} M(T) may still grow: exponent {growth}")
    return Verdict(not reasons, slope, growth, "; ".join(reasons))


def check_seeds(count: int) -> None:
    """Refuse to judge so few seeds."""
    if count < LEAST_SEEDS:
        raise FederationError(f"a verdict needs {LEAST_SEEDS} seeds, there are {count}")


def interval(values: np.ndarray, *, level: float = 0.95, draws: int = 2000) -> Interval:
    """Mean of [seeds] with its bootstrap interval."""
    means = values[_resamples(len(values), draws)].mean(axis=1)
    return Interval(float(values.mean()), *_quantiles(means, level))


def _intervals(horizons, values, claim: Claim) -> tuple[Interval, Interval]:
    x = np.log(horizons.astype(float))
    weights = (x - x.mean()) / np.square(x - x.mean()).sum()
    log_mean = np.log(values.mean(axis=1))
    draws = _resamples(values.shape[1], claim.draws)
    # A resample may, of quantities that can be negative, have a mean without a logarithm.
    means = np.maximum(values[:, draws].mean(axis=2), np.finfo(float).tiny)  # [H, draws]
    logs = np.log(means)
    last = lambda logs: (logs[-1] - logs[-2]) / (x[-1] - x[-2]) + claim.exponent
    slope = Interval(float(weights @ log_mean), *_quantiles(weights @ logs, claim.level))
    return slope, Interval(float(last(log_mean)), *_quantiles(last(logs), claim.level))


def _resamples(seeds: int, draws: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, seeds, (draws, seeds))


def _quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _inconsistent(reason: str) -> Verdict:
    return Verdict(False, NOTHING, NOTHING, reason)

"""The judgement of rates, on data whose rate is known."""

import numpy as np
import pytest

from h2tune_jax.study.rate import Claim, interval, judge
from h2tune_jax.types import FederationError

HORIZONS = 2 ** np.arange(4, 13)


def draw(law, noise=0.05, seeds=32, seed=0):
    """[H, seeds] round a law, with independent relative noise."""
    rng = np.random.default_rng(seed)
    return law(HORIZONS)[:, None] * np.exp(noise * rng.normal(size=(len(HORIZONS), seeds)))


@pytest.mark.parametrize(
    "law",
    [
        lambda t: 3 * t**-0.5,
        lambda t: t**-1.0,
        lambda t: 2 / t + 0.5 * t**-0.5,
        lambda t: t**-0.5 * (1 - np.exp(-t / 100)),  # rises to its limit before the last horizons
    ],
)
def test_what_falls_as_claimed_or_faster_is_consistent(law):
    verdict = judge(HORIZONS, draw(law))
    assert verdict.consistent
    assert verdict.reason == ""
    assert verdict.slope.low < verdict.slope.value < verdict.slope.high <= -0.45


@pytest.mark.parametrize(
    "law",
    [
        lambda t: np.ones(len(t)),
        lambda t: t**-0.4,
        lambda t: t**-0.2,
        lambda t: t**-0.5 + 0.02,  # a floor
        lambda t: t**0.3,
    ],
)
def test_what_falls_more_slowly_is_not(law):
    verdict = judge(HORIZONS, draw(law))
    assert not verdict.consistent
    assert "slope" in verdict.reason or "grow" in verdict.reason


def test_a_curve_that_flattens_at_the_end_is_caught_by_its_growth():
    # Falls as 1/T and then stays: the slope over four horizons is steep enough.
    law = lambda t: np.maximum(1 / t, 1 / 2048)
    verdict = judge(HORIZONS, draw(law))
    assert verdict.slope.high < -0.45
    assert not verdict.consistent
    assert "may still grow" in verdict.reason
    np.testing.assert_allclose(verdict.growth.value, 0.5, atol=0.05)


def test_other_claims():
    values = draw(lambda t: 1 / t)
    assert judge(HORIZONS, values, Claim(exponent=1.0)).consistent
    assert not judge(HORIZONS, draw(lambda t: t**-0.5), Claim(exponent=1.0)).consistent


def test_exact_data_have_the_exact_slope():
    verdict = judge(HORIZONS, np.repeat((7 * HORIZONS**-0.5)[:, None], 4, axis=1))
    np.testing.assert_allclose(verdict.slope, -0.5, atol=1e-12)
    np.testing.assert_allclose(verdict.growth, 0.0, atol=1e-12)


def test_noise_that_hides_the_rate_is_no_consistency():
    verdict = judge(HORIZONS, draw(lambda t: t**-0.5, noise=2.0, seeds=4))
    assert not verdict.consistent


def test_the_interval_covers_the_true_slope_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        verdict = judge(HORIZONS, draw(lambda t: t**-0.5, noise=0.3, seed=seed), Claim(draws=500))
        hits += verdict.slope.low <= -0.5 <= verdict.slope.high
    assert 0.88 <= hits / 200 <= 0.99


def test_runs_that_diverge_are_never_consistent():
    values = draw(lambda t: t**-0.5)
    values[-1, 3] = np.inf
    verdict = judge(HORIZONS, values)
    assert not verdict.consistent
    assert "diverged" in verdict.reason
    refused = np.zeros((9, 32))
    refused[-4, 0] = 2
    assert "2 client results" in judge(HORIZONS, draw(lambda t: t**-0.5), rejected=refused).reason
    # What is not among the last four horizons is not looked at.
    refused = np.zeros((9, 32))
    refused[0] = 1
    assert judge(HORIZONS, draw(lambda t: t**-0.5), rejected=refused).consistent


def test_too_little_data_is_said():
    values = draw(lambda t: t**-0.5)
    with pytest.raises(FederationError, match="needs 4 horizons, there are 3"):
        judge(HORIZONS[:3], values[:3])
    with pytest.raises(FederationError, match="needs 4 seeds, there are 3"):
        judge(HORIZONS, values[:, :3])
    assert "no logarithm" in judge(HORIZONS, -values).reason
    with pytest.raises(FederationError, match="ascend"):
        judge(HORIZONS[::-1], values)


def test_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=400) + 5
    found = interval(values)
    np.testing.assert_allclose(found.value, values.mean())
    np.testing.assert_allclose(found.high - found.low, 2 * 1.96 * values.std() / 20, rtol=0.1)

"""The quadratic's constants and exact expectations, and the engine held against them."""

import functools

import jax
import numpy as np
import pytest

import h2tune_jax as h2
from h2tune_jax.study.horizon import StepRule, make_horizon
from h2tune_jax.study.problems.quadratic import constant_step_floor, expected_run, quadratic

SMALL = {"num_clients": 4, "dim": 3, "local_steps": 3}


def objective(known, x):
    return 0.5 * (known.curvatures * (x - known.centres) ** 2).sum(axis=1).mean()


def test_constants_by_finite_differences():
    known = quadratic(**SMALL).solution
    eye, h = np.eye(3), 1e-4
    at = functools.partial(objective, known)
    grad = [(at(known.optimum + h * e) - at(known.optimum - h * e)) / (2 * h) for e in eye]
    np.testing.assert_allclose(grad, 0, atol=1e-8)
    np.testing.assert_allclose(at(known.optimum), known.minimum, rtol=1e-12)
    curvature = [
        (at(known.optimum + h * e) + at(known.optimum - h * e) - 2 * known.minimum) / h**2
        for e in eye
    ]
    np.testing.assert_allclose(max(curvature), known.smoothness, rtol=1e-5)
    np.testing.assert_allclose(min(curvature), known.convexity, rtol=1e-5)


def test_options_mean_what_they_say():
    known = quadratic(heterogeneity=2.0, convexity=0.2, smoothness=3.0).solution
    np.testing.assert_allclose((known.centres**2).sum(axis=1).mean(), 4.0, rtol=1e-5)
    assert known.curvatures.min() >= 0.2 - 1e-6
    assert known.curvatures.max() <= 3.0 + 1e-6
    alike = quadratic(heterogeneity=0.0).solution
    assert alike.heterogeneity == 0.0
    assert np.ptp(quadratic(spread=0.0).solution.curvatures, axis=0).max() == 0


def test_expected_run_by_simulation_in_float64():
    known = quadratic(**SMALL, sigma=0.7).solution
    rates = np.array([0.5, 0.3, 0.2])
    rng, count, dim = np.random.default_rng(0), *known.curvatures.shape
    runs = 40_000
    x = np.tile(known.start, (runs, 1))
    for rate in rates:
        clients = np.repeat(x[:, None], count, axis=1)
        for _ in range(known.local_steps):
            noise = known.sigma / dim**0.5 * rng.normal(size=clients.shape)
            clients -= rate * (known.curvatures * (clients - known.centres) + noise)
        x = clients.mean(axis=1)
    exact = expected_run(known, rates)
    gaps = 0.5 * (known.curvatures.mean(axis=0) * (x - known.optimum) ** 2).sum(axis=1)
    assert abs(gaps.mean() - exact.gap[-1]) < 4 * gaps.std() / runs**0.5
    np.testing.assert_allclose(exact.gap[0], objective(known, known.start) - known.minimum)


def test_the_floor_is_where_the_recursion_ends():
    known = quadratic(**SMALL).solution
    floor = constant_step_floor(known, 0.3)
    exact = expected_run(known, np.full(400, 0.3))
    np.testing.assert_allclose(exact.gap[-1], floor.drift + floor.noise, rtol=1e-9)
    # The noise's floor is proportional to the step, that of drift to its square.
    small, smaller = constant_step_floor(known, 0.01), constant_step_floor(known, 0.005)
    np.testing.assert_allclose(small.noise / smaller.noise, 2, rtol=0.02)
    np.testing.assert_allclose(small.drift / smaller.drift, 4, rtol=0.05)
    # Linear convergence before the floor: without noise and drift, by the slowest coordinate's factor.
    plain = quadratic(**SMALL, sigma=0.0, spread=0.0).solution
    gap = expected_run(plain, np.full(300, 0.3)).gap
    factor = constant_step_floor(plain, 0.3).factor
    np.testing.assert_allclose(gap[251] / gap[250], factor**2, rtol=1e-6)


@functools.cache
def runner(kind, sigma):
    problem = quadratic(**SMALL, sigma=sigma)
    step = StepRule(kind=kind, offset=8.0)
    return problem, step, make_horizon(h2.fedavg(), problem, step=step)


@pytest.mark.parametrize("kind", ["constant", "decreasing"])
def test_the_engine_without_noise_is_the_recursion(kind):
    problem, step, run = runner(kind, 0.0)
    known = problem.solution
    for horizon in (1, 7, 20):
        outcome = run(horizon, [0.3, 0.6], [0, 1])
        for place, constant in enumerate((0.3, 0.6)):
            exact = expected_run(
                known, np.array([step.rate(constant, t, horizon) for t in range(horizon)])
            )
            gap = outcome.last.loss[place] - known.minimum
            np.testing.assert_allclose(gap, exact.gap[-1], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(
                outcome.mean.shared[place], exact.grad[:-1].mean(), rtol=1e-4
            )


def test_the_engine_with_noise_has_the_exact_mean():
    problem, _, run = runner("constant", 1.0)
    known = problem.solution
    outcome = run(50, np.full(64, 0.3), np.arange(64))
    exact = expected_run(known, np.full(50, 0.3))
    for sample, value in (
        (np.asarray(outcome.last.loss) - known.minimum, exact.gap[-1]),
        (np.asarray(outcome.mean.shared), exact.grad[:-1].mean()),
    ):
        assert abs(sample.mean() - value) < 4 * sample.std() / 8
        assert sample.std() > 0


def test_bins_are_means_over_their_rounds():
    _, _, run = runner("constant", 1.0)
    outcome = jax.tree.map(np.asarray, run(11, np.full(64, 0.3), np.arange(64)))
    counts = np.array([1, 2, 4, 4])  # rounds 0, 1-2, 3-6, 7-10
    for mean, binned in zip(outcome.mean, outcome.binned):
        np.testing.assert_allclose((binned[:, :4] * counts).sum(axis=1) / 11, mean, rtol=1e-5)
        assert np.isnan(binned[:, 4:]).all()


def test_runs_in_parts_are_the_runs_at_once():
    problem, step, run = runner("constant", 1.0)
    whole = run(9, [0.1, 0.2, 0.3, 0.4], [0, 1, 2, 3])
    parts = make_horizon(h2.fedavg(), problem._replace(runs_at_once=3), step=step)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        parts(9, [0.1, 0.2, 0.3, 0.4], [0, 1, 2, 3]),
        whole,
    )


def test_step_rules():
    rate = lambda kind: StepRule(kind=kind, offset=2.0).rate(3.0, 4, 16)
    assert rate("sqrt") == 0.75
    assert rate("constant") == 3.0
    assert rate("inverse") == 3 / 16
    assert rate("decreasing") == 0.5
    with pytest.raises(h2.FederationError, match="did you mean 'sqrt'"):
        StepRule(kind="sqr")

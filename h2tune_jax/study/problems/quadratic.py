"""A strongly convex federated quadratic whose every constant is known, for methods of whole models.

    f_i(x) = 1/2 (x - b_i)^T H_i (x - b_i),    H_i diagonal with entries in [mu, L].

A stochastic gradient adds N(0, sigma^2 / d I) afresh at every step, so that its variance is sigma^2. As
everything is linear and the coordinates are independent, what FedAvg does to it can be computed exactly:
`expected_run`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.study.problem import Problem
from h2tune_jax.types import Budget, ClientData, CohortSpec, ModelSpec


class Quadratic(NamedTuple):
    """The constants, float64."""

    curvatures: np.ndarray  # [N, d], the diagonals of H_i
    centres: np.ndarray  # [N, d]
    start: np.ndarray  # [d]
    sigma: float
    local_steps: int

    @property
    def optimum(self) -> np.ndarray:
        """Where F is least, [d]."""
        return (self.curvatures * self.centres).sum(axis=0) / self.curvatures.sum(axis=0)

    @property
    def minimum(self) -> float:
        """F there."""
        return float(0.5 * (self.curvatures * (self.optimum - self.centres) ** 2).sum(1).mean())

    @property
    def smoothness(self) -> float:
        """L of F."""
        return float(self.curvatures.mean(axis=0).max())

    @property
    def convexity(self) -> float:
        """mu of F."""
        return float(self.curvatures.mean(axis=0).min())

    @property
    def heterogeneity(self) -> float:
        """zeta: the root of 1/N sum_i |grad f_i|^2 at the optimum."""
        grads = self.curvatures * (self.optimum - self.centres)
        return float(np.sqrt((grads**2).sum(axis=1).mean()))


def quadratic(
    *,
    num_clients: int = 10,
    dim: int = 8,
    convexity: float = 0.1,
    smoothness: float = 1.0,
    heterogeneity: float = 1.0,
    spread: float = 1.0,
    sigma: float = 1.0,
    local_steps: int = 4,
    seed: int = 0,
) -> Problem:
    """Build the problem; `solution` holds its `Quadratic`.

    Args:
      num_clients: N.
      dim: d.
      convexity, smoothness: mu and L of every f_i.
      heterogeneity: the root of the mean square distance of the b_i from their mean.
      spread: 0 gives all clients one H, 1 draws each client's entries from [mu, L] on its own.
      sigma: the root of the gradient noise's variance at a local step.
      local_steps: a round.
      seed: of what is drawn.
    """
    rng = np.random.default_rng(seed)
    common = np.geomspace(convexity, smoothness, dim)
    own = np.exp(rng.uniform(np.log(convexity), np.log(smoothness), (num_clients, dim)))
    curvatures = (1 - spread) * common[None, :] + spread * own
    centres = rng.normal(size=(num_clients, dim))
    centres -= centres.mean(axis=0)
    centres *= heterogeneity / np.sqrt((centres**2).sum(axis=1).mean())
    start = 2 * rng.normal(size=dim) / np.sqrt(dim)
    # The arrays are float32: what they hold is the problem.
    curvatures, centres, start = (
        x.astype(np.float32).astype(float) for x in (curvatures, centres, start)
    )
    known = Quadratic(curvatures, centres, start, sigma, local_steps)
    scale = float(sigma / np.sqrt(dim))

    def loss_fn(adapters, base, batch, key):
        del base
        x, own = adapters.head, jax.tree.map(lambda leaf: leaf[0], batch.examples)
        loss = 0.5 * (own["curvature"] * jnp.square(x - own["centre"])).sum()
        if key is not None:
            loss = loss + scale * (jax.random.normal(key, x.shape, x.dtype) * x).sum()
        return loss, {}

    spec = CohortSpec(
        name="quadratic",
        num_clients=num_clients,
        model=ModelSpec(num_layers=1, sites={"q": (1, 1)}),
        rank=1,
        targets=(),
        loss_fn=loss_fn,
        init_head_fn=lambda key: jnp.asarray(start, jnp.float32),
        budget=Budget(batch_size=1, steps=local_steps, shuffle=False),
    )
    examples = {
        "curvature": jnp.asarray(curvatures[:, None, :], jnp.float32),
        "centre": jnp.asarray(centres[:, None, :], jnp.float32),
    }
    return Problem(
        name="quadratic",
        specs=(spec,),
        bases=((),),
        data=(ClientData(examples, jnp.ones(num_clients, jnp.int32)),),
        minimum=known.minimum,
        solution=known,
        rows=1,
    )


class Expected(NamedTuple):
    """Exact expectations over the noise, at the start of rounds 0 ... T, [T + 1]."""

    gap: np.ndarray  # E F(x_t) - min F
    grad: np.ndarray  # E |grad F(x_t)|^2


def expected_run(known: Quadratic, rates: np.ndarray) -> Expected:
    """Compute what FedAvg with full participation does on average, round by round; `rates` is [T].

    A local step is x <- x - eta (H_i (x - b_i) + noise), so mean and variance of every coordinate
    follow a linear recursion: with a_i = 1 - eta h_i and E local steps,

        m <- mean_i (b_i + a_i^E (m - b_i)),
        V <- (mean_i a_i^E)^2 V + eta^2 sigma^2 / d / N^2 sum_i sum_{k<E} a_i^(2k).
    """
    h, b = known.curvatures, known.centres
    count, dim = h.shape
    curvature, optimum = h.mean(axis=0), known.optimum
    mean, variance = known.start.astype(float), np.zeros(dim)
    gap, grad = [], []
    for rate in [*rates, None]:
        spread = (mean - optimum) ** 2 + variance
        gap.append(0.5 * (curvature * spread).sum())
        grad.append((curvature**2 * spread).sum())
        if rate is None:
            break
        a = 1 - rate * h
        shrink = a**known.local_steps
        noise = sum(a ** (2 * k) for k in range(known.local_steps)).sum(axis=0)  # pyright: ignore
        mean = (b + shrink * (mean - b)).mean(axis=0)
        variance = shrink.mean(axis=0) ** 2 * variance
        variance = variance + rate**2 * known.sigma**2 / dim / count**2 * noise
    return Expected(np.asarray(gap), np.asarray(grad))


class Floor(NamedTuple):
    """Where FedAvg with a constant step ends, and how fast."""

    drift: float  # F - min F at the fixed point of the noiseless round: what local steps cost
    noise: float  # what the noise adds to it
    factor: float  # by which the slowest coordinate of x - its fixed point shrinks in a round


def constant_step_floor(known: Quadratic, rate: float) -> Floor:
    """Compute the fixed point and the stationary variance of `expected_run` in closed form."""
    h, b, steps = known.curvatures, known.centres, known.local_steps
    count, dim = h.shape
    a = 1 - rate * h
    moved = 1 - a**steps
    fixed = (moved * b).sum(axis=0) / moved.sum(axis=0)
    shrink = (a**steps).mean(axis=0)
    fed = (1 - a ** (2 * steps)) / (1 - a**2)
    variance = rate**2 * known.sigma**2 / dim / count**2 * fed.sum(axis=0) / (1 - shrink**2)
    curvature = h.mean(axis=0)
    return Floor(
        drift=float(0.5 * (curvature * (fixed - known.optimum) ** 2).sum()),
        noise=float(0.5 * (curvature * variance).sum()),
        factor=float(np.abs(shrink).max()),
    )

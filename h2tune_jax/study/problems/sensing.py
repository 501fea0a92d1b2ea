"""Matrix sensing: every client finds low-rank matrices from random linear measurements of them.

    y_jl = <X_jl, W*_il> + tau e_jl,    W*_il = A*_il (T*_l + zeta T*_il) B*_il of the client's own rank,
    f_i = 1/2 mean_j sum_l (<X_jl, dW_il> - y_jl)^2.

The middle T* is common to all clients, the outer factors are their own: a non-convex problem in the
triple factors whose solution is known. With tau = 0 the least F is 0, and the clients' W* reach it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.study.problem import Problem
from h2tune_jax.study.problems.partial import deltas
from h2tune_jax.types import Budget, ClientData, CohortSpec, ModelSpec

SHAPES = ((5, 2, 2), (6, 1, 3))  # width, layers, rank of each architecture


def sensing(
    *,
    num_clients: int = 8,
    measurements: int = 64,
    heterogeneity: float = 0.3,
    noise: float = 0.3,
    local_steps: int = 4,
    batch_size: int = 8,
    seed: int = 0,
) -> Problem:
    """Build the problem; `solution` holds the W* [C, Li, D, D] of each cohort.

    Args:
      num_clients: of all cohorts together, half of them each.
      measurements: n, of each client.
      heterogeneity: zeta.
      noise: tau.
      local_steps, batch_size: a round; gradient noise comes from the batches.
      seed: of what is drawn.
    """
    rng = np.random.default_rng(seed)
    count = num_clients // 2
    size = max(rank for *_, rank in SHAPES)
    common = rng.normal(size=(max(layers for _, layers, _ in SHAPES), size, size)) / size**0.5
    specs, data, solutions = [], [], []
    for name, (width, layers, rank) in zip(("narrow", "wide"), SHAPES):
        own = rng.normal(size=(count, layers, rank, rank)) / rank**0.5
        middle = common[:layers, :rank, :rank] + heterogeneity * own
        left = rng.normal(size=(count, layers, width, rank)) / width**0.5
        right = rng.normal(size=(count, layers, rank, width)) / width**0.5
        solution = left @ middle @ right
        solution /= np.sqrt((solution**2).sum(axis=(2, 3), keepdims=True))
        x = rng.normal(size=(count, measurements, layers, width, width))
        y = np.einsum("cjlde,clde->cjl", x, solution)
        y += noise * rng.normal(size=y.shape)
        specs.append(
            CohortSpec(
                name=name,
                num_clients=count,
                model=ModelSpec(num_layers=layers, sites={"q": (width, width)}, name=name),
                rank=rank,
                alpha=2.0 * rank,
                loss_fn=_loss_fn(layers, width),
                budget=Budget(batch_size=batch_size, steps=local_steps),
            )
        )
        rows = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
        data.append(ClientData(rows, jnp.full(count, measurements, jnp.int32)))
        solutions.append(solution)
    return Problem(
        name="matrix sensing",
        specs=tuple(specs),
        bases=((), ()),
        data=tuple(data),
        minimum=0.0 if noise == 0 else None,
        solution=tuple(solutions),
        rows=measurements,
    )


def _loss_fn(layers: int, width: int):
    def loss_fn(adapters, base, batch, key):
        del base, key
        delta = deltas(adapters.sites, layers, width)
        seen = jnp.einsum("jlde,lde->jl", batch.examples["x"], delta)
        squares = 0.5 * jnp.square(seen - batch.examples["y"]).sum(axis=1)
        mask = batch.mask.astype(squares.dtype)
        return (squares * mask).sum() / jnp.maximum(mask.sum(), 1), {}

    return loss_fn


def distance(problem: Problem, adapters: tuple) -> np.ndarray:
    """|dW - W*| / |W*| of all clients, [N]; `adapters` has each cohort's, leaves [C, ...]."""
    found = []
    for (width, layers, _), own, solution in zip(SHAPES, adapters, problem.solution):
        delta = jax.vmap(lambda one, d=width, n=layers: deltas(one.sites, n, d))(own)
        off = np.square(np.asarray(delta) - solution).sum(axis=(1, 2, 3))
        found.append(np.sqrt(off / np.square(solution).sum(axis=(1, 2, 3))))
    return np.concatenate(found)

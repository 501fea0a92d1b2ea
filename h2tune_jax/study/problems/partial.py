"""A quadratic with shared and personal parts, read through adapted sites and a head.

A client sees its adapted weights dW_l and its head v through

    f_i = 1/2 sum_l <h_i, (dW_l - C_il)^2> + 1/2 |v + K_i vec(mean_l dW_l) - c_i|^2,

a strongly convex quadratic of (dW, v). Two architectures with different widths, depths and ranks share what
the method lets them share. With frozen outer factors dW is linear in H2Tune's middle matrices, whose
objective is then a quadratic of P^T G and v. Gradient noise is Gaussian, fresh at every step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.adapters.site import adapted
from h2tune_jax.study.problem import Problem
from h2tune_jax.types import Budget, ClientData, CohortSpec, ModelSpec

HEAD = 3  # p, entries of a head
SHAPES = ((4, 2, 2), (5, 1, 3))  # width, layers, rank of each architecture


def partial(
    *,
    num_clients: int = 8,
    convexity: float = 0.3,
    smoothness: float = 1.0,
    heterogeneity: float = 1.0,
    sigma: float = 1.0,
    local_steps: int = 4,
    seed: int = 0,
) -> Problem:
    """Build the problem.

    Args:
      num_clients: of all cohorts together, half of them each.
      convexity, smoothness: the range of the entries of h_i.
      heterogeneity: the root of the mean square distance of the clients' (C_il, c_i) from what is
        common to their architecture.
      sigma: size of the gradient noise on the entries of dW and v (each N(0, sigma^2 / their number)).
      local_steps: a round.
      seed: of what is drawn.
    """
    rng = np.random.default_rng(seed)
    count = num_clients // 2
    specs, data = [], []
    for name, (width, layers, rank) in zip(("narrow", "wide"), SHAPES):
        entries = layers * width * width

        def around(*shape, size=heterogeneity):
            """One common draw, and each client's own beside it."""
            own = rng.normal(size=(count, *shape))
            own *= size / np.sqrt((own**2).reshape(count, -1).sum(axis=1).mean())
            common = rng.normal(size=shape)
            return common / np.sqrt((common**2).sum()) * 2 + own

        examples = {
            "curvature": rng.uniform(convexity, smoothness, (count, layers, width, width)),
            "target": around(layers, width, width),
            "centre": around(HEAD),
            "coupling": 0.5 * rng.normal(size=(count, HEAD, width * width)) / width,
        }
        specs.append(
            CohortSpec(
                name=name,
                num_clients=count,
                model=ModelSpec(num_layers=layers, sites={"q": (width, width)}, name=name),
                rank=rank,
                alpha=2.0 * rank,
                loss_fn=_loss_fn(layers, width, sigma / np.sqrt(entries + HEAD)),
                init_head_fn=lambda key: jnp.zeros(HEAD),
                budget=Budget(batch_size=1, steps=local_steps, shuffle=False),
            )
        )
        rows = {field: jnp.asarray(x[:, None], jnp.float32) for field, x in examples.items()}
        data.append(ClientData(rows, jnp.ones(count, jnp.int32)))
    return Problem("partial quadratic", tuple(specs), ((), ()), tuple(data), rows=1)


def deltas(sites, layers: int, width: int):  # [Li, D, D]
    """Return the adapted weights themselves: what the adapter makes of the unit matrix."""
    zero = jnp.zeros((width, width))
    eye = jnp.eye(width)
    each = [jax.tree.map(lambda leaf, at=layer: leaf[at], sites["q"]) for layer in range(layers)]
    return jnp.stack([adapted(eye, zero, site) for site in each])


def _loss_fn(layers: int, width: int, noise: float):
    def loss_fn(adapters, base, batch, key):
        del base
        own = jax.tree.map(lambda leaf: leaf[0], batch.examples)
        delta = deltas(adapters.sites, layers, width)
        loss = 0.5 * (own["curvature"] * jnp.square(delta - own["target"])).sum()
        told = own["coupling"] @ delta.mean(axis=0).ravel()
        loss = loss + 0.5 * jnp.square(adapters.head + told - own["centre"]).sum()
        if key is not None:
            keys = jax.random.split(key)
            shake = lambda key, x: (jax.random.normal(key, x.shape, x.dtype) * x).sum()
            loss = loss + noise * (shake(keys[0], delta) + shake(keys[1], adapters.head))
        return loss, {}

    return loss_fn

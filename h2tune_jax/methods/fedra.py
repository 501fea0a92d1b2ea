"""FedRA (Su et al., ECCV 2024, arXiv 2311.11227): random layers for clients that cannot train all.

Every round each client is given n_i layers at random, without replacement; a layer becomes the mean over
those who trained it.

In the paper a client's model consists of its layers alone; here it computes through the whole frozen base,
as every loss function does, and trains its layers' factors.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import optax

from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.layer_subsets import draw_layers, layer_subsets
from h2tune_jax.methods.lora import Training
from h2tune_jax.training import Schedule


def fedra(
    *,
    budgets: Mapping[str, int] | None = None,
    heads: str = "personal",
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build FedRA. The options that are not named here are those of `local`.

    Cohorts of one architecture need equal ranks; they differ by how many layers they train.

    Args:
      budgets: cohort -> how many layers its clients train a round; half of them, rounded up, for
        cohorts that it does not name.
      heads: "personal", or "shared" between cohorts of an architecture with the same `init_head_fn`.
    """
    training = Training(learning_rate, head_rate, weight_decay, optimizer, "restart", schedule)

    def allocate(spec, account, key, count):
        del account
        return draw_layers(key, jnp.ones(spec.model.num_layers), count)

    return layer_subsets("fedra", training, budgets=budgets, heads=heads, allocate_fn=allocate)

"""FedSA-LoRA (Guo et al., ICLR 2025, arXiv 2410.01463): A is shared, B stays with its client.

    A = sum_i s_i A_i,    B_i trained and kept.

Its finding: trained A matrices resemble each other across clients, B matrices do not.
"""

import optax

from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.lora import Training, averaging
from h2tune_jax.training import Schedule


def fedsa_lora(
    *,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build FedSA-LoRA: the clients of an architecture start every round from the mean of A.

    The options are those of `local`. B and heads are personal. Cohorts of one architecture need equal
    ranks.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    return averaging("fedsa_lora", training, shares=("a",))

"""FedIT (Zhang et al. 2023, arXiv 2305.05644): FedAvg of LoRA factors.

    A = sum_i s_i A_i,    B = sum_i s_i B_i.

The mean of products is not the product of means: `fedex_lora` keeps what this loses.
"""

import optax

from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.lora import Training, averaging
from h2tune_jax.training import Schedule


def fedit(
    *,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build FedIT: the clients of an architecture start every round from the means of A and B.

    The options are those of `local`. Heads are personal. Cohorts of one architecture need equal ranks.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    return averaging("fedit", training, shares=("a", "b"))

"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A stays frozen at a common start.

    A_i = A for everyone and for ever,    B = sum_i s_i B_i.

With A fixed the mean of products is the product of means, and only B travels.
"""

import optax

from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.lora import Training, averaging
from h2tune_jax.training import Schedule


def ffa_lora(
    *,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    optimizer_state: str = "restart",
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build FFA-LoRA: the clients of an architecture train and share B between them.

    The options are those of `local`; `learning_rate` is that of B. A is drawn by the server, once an
    architecture, and sent at first contact. Heads are personal. Cohorts of one architecture need equal
    ranks.
    """
    training = Training(
        learning_rate, head_rate, weight_decay, optimizer, optimizer_state, schedule
    )
    return averaging("ffa_lora", training, shares=("b",), freezes=("a",))

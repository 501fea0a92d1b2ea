"""Federated fine-tuning of foundation models across architectures and tasks, in JAX.

`docs/api.md` is the one-page reference of what is public.
"""

from h2tune_jax.adapters import relation, triple
from h2tune_jax.adapters.block import beside_block
from h2tune_jax.adapters.site import SiteAdapter, adapted
from h2tune_jax.evaluate import make_evaluate
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.ce_lora import ce_lora
from h2tune_jax.methods.centralised import centralised
from h2tune_jax.methods.co_lora import co_lora
from h2tune_jax.methods.fed_hello import fed_hello
from h2tune_jax.methods.fedavg import fedavg
from h2tune_jax.methods.fedex_lora import fedex_lora
from h2tune_jax.methods.fedit import fedit
from h2tune_jax.methods.fedra import fedra
from h2tune_jax.methods.fedsa_lora import fedsa_lora
from h2tune_jax.methods.ffa_lora import ffa_lora
from h2tune_jax.methods.flexlora import flexlora
from h2tune_jax.methods.flora import flora
from h2tune_jax.methods.h2tune import (
    COMMON,
    PAPER,
    REFERENCE,
    H2TuneHyper,
    H2TuneOptions,
    h2tune,
    shared_kinds,
)
from h2tune_jax.methods.heterotune import heterotune
from h2tune_jax.methods.hetlora import hetlora
from h2tune_jax.methods.local import local
from h2tune_jax.methods.noise import noisy
from h2tune_jax.methods.proximal import proximal
from h2tune_jax.methods.server_optimizer import server_optimizer
from h2tune_jax.round import (
    RoundMetrics,
    init_round,
    make_round,
    start_clients,
    start_server,
)
from h2tune_jax.training import cosine_schedule
from h2tune_jax.types import (
    KINDS,
    Adapters,
    Batch,
    Budget,
    ClientData,
    CohortSpec,
    Download,
    FederationError,
    ModelSpec,
    Places,
    RoundState,
)

__all__ = [
    "COMMON",
    "KINDS",
    "PAPER",
    "REFERENCE",
    "Adapters",
    "Batch",
    "Budget",
    "ClientData",
    "CohortSpec",
    "Download",
    "FederatedMethod",
    "FederationError",
    "H2TuneHyper",
    "H2TuneOptions",
    "ModelSpec",
    "Places",
    "RoundMetrics",
    "RoundState",
    "SiteAdapter",
    "adapted",
    "beside_block",
    "ce_lora",
    "centralised",
    "co_lora",
    "cosine_schedule",
    "fed_hello",
    "fedavg",
    "fedex_lora",
    "fedit",
    "fedra",
    "fedsa_lora",
    "ffa_lora",
    "flexlora",
    "flora",
    "h2tune",
    "heterotune",
    "hetlora",
    "init_round",
    "local",
    "make_evaluate",
    "make_round",
    "noisy",
    "proximal",
    "relation",
    "server_optimizer",
    "shared_kinds",
    "start_clients",
    "start_server",
    "triple",
]

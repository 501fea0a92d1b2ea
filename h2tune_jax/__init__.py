"""Federated fine-tuning of foundation models across architectures and tasks, in JAX.

`docs/api.md` is the one-page reference of what is public.
"""

from h2tune_jax.adapters import relation, triple
from h2tune_jax.adapters.site import SiteAdapter, adapted
from h2tune_jax.evaluate import make_evaluate
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.fedavg import fedavg
from h2tune_jax.methods.h2tune import REFERENCE, H2TuneHyper, H2TuneOptions, h2tune, shared_kinds
from h2tune_jax.methods.local import local
from h2tune_jax.round import RoundMetrics, init_round, make_round
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
    RoundState,
)

__all__ = [
    "KINDS",
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
    "RoundMetrics",
    "RoundState",
    "SiteAdapter",
    "adapted",
    "cosine_schedule",
    "fedavg",
    "h2tune",
    "init_round",
    "local",
    "make_evaluate",
    "make_round",
    "relation",
    "shared_kinds",
    "triple",
]

"""H2Tune: federated fine-tuning across architectures and tasks (arXiv 2507.22633).

Clients share rank-consistent middle matrices G [L, K, R, R]. Each reads them through
its own layer relation P and its own selection, as a sparse core T between its own outer factors:

    y = x W + alpha/r ((x A) + (x A) T) B,    T taken from M[l] = sum_j P[j, l] G[j].

`options` holds the choices, `server` the start and the mean, `client` one client's round, `steps` its
two halves and `terms` their regularisers. `docs/h2tune.md` says where this departs from the paper, and
where the authors' public code does.
"""

from functools import partial
from typing import Any

from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.h2tune import client, server
from h2tune_jax.methods.h2tune.options import (
    COMMON,
    PAPER,
    REFERENCE,
    H2TuneHyper,
    H2TuneOptions,
    make_options,
)
from h2tune_jax.methods.h2tune.state import (
    H2TuneClient,
    H2TuneServer,
    H2TuneUpload,
    shared_kinds,
)
from h2tune_jax.training import check_optimizer

__all__ = [
    "COMMON",
    "PAPER",
    "REFERENCE",
    "H2TuneClient",
    "H2TuneHyper",
    "H2TuneOptions",
    "H2TuneServer",
    "H2TuneUpload",
    "h2tune",
    "shared_kinds",
]


def h2tune(preset: H2TuneOptions | None = None, /, **changes: Any) -> FederatedMethod:
    """Build H2Tune from `H2TuneOptions`: the defaults or a preset, with changes by keyword.

    `h2tune(selection="leading", learning_rate=3e-3)`, `h2tune(REFERENCE, shared_rank=64)`.
    """
    options = make_options(preset, changes)
    check_optimizer(options.transform)  # here, as no array may be made where presets are: at import
    return FederatedMethod(
        name="h2tune",
        hyper=options.hyper(),
        init_server=partial(server.init_server, options),
        init_client=partial(client.init_client, options),
        broadcast=partial(server.broadcast, options),
        client_update=partial(client.client_update, options),
        # Where every client gets a mean of its own, the server needs what each has sent.
        reduce=None if options.sharing == "similar" else partial(server.reduce, options),
        server_aggregate=partial(server.server_aggregate, options),
        adapters=partial(client.adapters, options),
        check=partial(server.check, options),
        shared={"mean": ("middle",), "similar": (), "none": None}[options.sharing],
    )

"""What a federated method is: a tuple of pure functions, and the contract of each.

Client functions are written for one client, without a client axis; the engine (`round.py`) batches
them. Functions that take `specs` see the whole federation, functions that take `spec` one cohort.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from h2tune_jax.types import (
    Adapters,
    Array,
    ClientData,
    CohortSpec,
    Download,
    Metrics,
    PyTree,
    Specs,
)

DriftFn = Callable[[PyTree, PyTree], Array]
"""(the shared part as it is trained, the same as it was downloaded) -> a scalar, added to the loss."""


class InitServer(Protocol):
    """Start the server. `bases` and `probe` (public texts, or None) have one entry a cohort."""

    def __call__(self, specs: Specs, key: Array, bases: tuple, probe: PyTree, /) -> PyTree: ...


class InitClient(Protocol):
    """Start one client from what the server sends it at first contact.

    May depend only on the parts of the download that never change, so that a client's start does not
    depend on when it is first seen.
    """

    def __call__(
        self, spec: CohortSpec, key: Array, base: PyTree, download: Download
    ) -> PyTree: ...


class Broadcast(Protocol):
    """Decide what each cohort's participants are sent. `client_ids` has i32[S] a cohort."""

    def __call__(
        self,
        specs: Specs,
        key: Array,
        server: PyTree,
        client_ids: tuple[Array, ...],
        round_index: Array,
        /,
    ) -> tuple[Download, ...]: ...


class ClientUpdate(Protocol):
    """Train one client: -> (its next state, what it uploads, what people look at).

    The metrics are scalars. Among them are `loss`, and what has to travel, in numbers and in bytes
    (`traffic` of `methods/traffic.py`). The engine refuses the client's result when loss, upload or
    next state is not finite.

    With a `drift_fn` the method adds `drift_fn(shared part, shared part as downloaded)` to the
    objective that trains its shared part: how `proximal` wraps any method. The engine gives none.
    """

    def __call__(
        self,
        spec: CohortSpec,
        key: Array,
        base: PyTree,
        client: PyTree,
        download: Download,
        data: ClientData,
        hyper: Any,
        round_index: Array,
        /,
        *,
        drift_fn: DriftFn | None = None,
    ) -> tuple[PyTree, PyTree, Metrics]: ...


class Reduce(Protocol):
    """Turn one upload into the summand that the server needs, for methods whose rule is a sum.

    The engine adds the summands of a cohort as they come, so that never more than a chunk of uploads
    exists at once. Weight 0 must give zeros.
    """

    def __call__(self, spec: CohortSpec, upload: PyTree, weight: Array, /) -> PyTree: ...


class ServerAggregate(Protocol):
    """Take in a round: -> (next server state, metrics).

    `uploads` holds, a cohort, the summed `reduce` results; without a `reduce`, the stacked uploads
    [S, ...], zero where the client's weight is zero. A cohort that nobody was sampled from has None.
    """

    def __call__(
        self,
        specs: Specs,
        key: Array,
        server: PyTree,
        bases: tuple,
        probe: PyTree,
        uploads: tuple,
        weights: tuple[Array, ...],
        client_ids: tuple[Array, ...],
        round_index: Array,
        /,
    ) -> tuple[PyTree, Metrics]: ...


class BuildAdapters(Protocol):
    """Give what evaluation, export and prediction use of one client.

    `download=None` asks for the model as local training left it; with a download, for the model right
    after it.
    """

    def __call__(
        self, spec: CohortSpec, server: PyTree, client: PyTree, download: Download | None, /
    ) -> Adapters: ...


class FederatedMethod(NamedTuple):
    """A federated method. `hyper` is a NamedTuple of scalar arrays: the traced settings' defaults.

    `check(specs)` raises `FederationError` for federations that the method cannot serve.

    `shared` names the fields of the server's state (a NamedTuple) that a round moves, entry by entry,
    to a mean of what clients trained: what a server optimiser may take over. Empty where clients share
    something that has no such entries, None where they share nothing. `sends_change` says that uploads
    are what became of the shared part less what it was, not the part as trained.
    """

    name: str
    hyper: Any
    init_server: InitServer
    init_client: InitClient
    broadcast: Broadcast
    client_update: ClientUpdate
    reduce: Reduce | None
    server_aggregate: ServerAggregate
    adapters: BuildAdapters
    check: Callable[[Specs], None]
    shared: tuple[str, ...] | None = None
    sends_change: bool = False

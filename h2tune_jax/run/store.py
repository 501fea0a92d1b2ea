"""Where clients' personal state lives between rounds.

`DeviceStore` keeps whole cohorts on the device; `run.row_store.RowStore` keeps the clients that have
trained, in host memory or in files. Both hand the same programs the same arrays, so results are the same
bit for bit. The loop asks a store, round after round:

    clients = store.take(server, ids)              # for the round that starts now
    ...the round is handed to the device...
    store.put(ids, clients, following)             # what came of them, and who comes next
    store.look(server, cohort, ids)                # for evaluation: changes nothing
    frozen = store.freeze()                        # what a checkpoint of this moment holds
"""

import functools
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.run import checkpoint
from h2tune_jax.run.checkpoint import Arrays
from h2tune_jax.run.programs import Programs, copy_tree, put_rows, take_rows
from h2tune_jax.run.records import Mark
from h2tune_jax.run.sampling import Participants
from h2tune_jax.types import PyTree


class Frozen(NamedTuple):
    """A store's part of a checkpoint."""

    arrays: Mapping[str, Any]  # by path; may still be on the device
    meta: dict[str, Any]
    beside: dict[str, Mark]


class Store(Protocol):
    """What the loop needs of a store."""

    def begin(self, server: PyTree) -> None:
        """Start with clients that have never trained."""
        ...

    def restore(self, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint holds."""
        ...

    def take(self, server: PyTree, ids: Participants) -> tuple[PyTree, ...]:
        """Return participants' state on the device, leaves [S, ...], to be given away to the round."""
        ...

    def put(
        self, ids: Participants, clients: tuple[PyTree, ...], following: Participants | None
    ) -> None:
        """Keep what a round made of its participants; `following` will be taken next."""
        ...

    def look(self, server: PyTree, cohort: int, ids: np.ndarray) -> PyTree:
        """Return clients as they are now, leaves [len(ids), ...]."""
        ...

    def freeze(self) -> "Future | Frozen":
        """Note the present state for a checkpoint, without waiting for the device."""
        ...

    def collect(self, kept: set[str]) -> None:
        """Delete files that neither the present state needs nor the checkpoints, who need `kept`."""
        ...


def start_many(programs: Programs, server: PyTree, cohort: int, ids: np.ndarray) -> list[PyTree]:
    """Start clients in calls of one width: a list of trees that hold them in order, the last padded."""
    width = programs.start_width(cohort)
    padded = np.resize(ids, -(-len(ids) // width) * width).astype(np.int32)
    return [
        programs.start_clients(server, cohort, padded[i : i + width])
        for i in range(0, len(padded), width)
    ]


@functools.partial(jax.jit, static_argnums=1)
def _join(parts: list[PyTree], count: int) -> PyTree:
    return jax.tree.map(lambda *rows: jnp.concatenate(rows)[:count], *parts)


class DeviceStore:
    """Whole cohorts on the device."""

    def __init__(self, programs: Programs):
        self._programs = programs
        self.clients: tuple[PyTree, ...] = ()

    def begin(self, server: PyTree) -> None:
        cohorts = []
        for cohort, spec in enumerate(self._programs.specs):
            ids = np.arange(spec.num_clients, dtype=np.int32)
            parts = start_many(self._programs, server, cohort, ids)
            cohorts.append(_join(parts, spec.num_clients))
        self.clients = self._programs.place(tuple(cohorts))

    def restore(self, arrays: Arrays, meta: Mapping[str, Any]) -> None:
        server = self._programs.server_shapes()
        shapes = self._programs.client_shapes(server)
        cohorts = []
        for cohort, (spec, client) in enumerate(zip(self._programs.specs, shapes)):
            stack = lambda leaf, spec=spec: jax.ShapeDtypeStruct(
                (spec.num_clients, *leaf.shape), leaf.dtype
            )
            like = jax.tree.map(stack, client)
            cohorts.append(checkpoint.unflatten(like, arrays, f".clients[{cohort}]"))
        self.clients = self._programs.place(tuple(cohorts))

    def _is_all(self, cohort: int, ids: np.ndarray) -> bool:
        # Ids ascend without repeats, so as many as there are, are all in order.
        return len(ids) == self._programs.specs[cohort].num_clients

    def take(self, server: PyTree, ids: Participants) -> tuple[PyTree, ...]:
        return tuple(
            rows if self._is_all(cohort, chosen) else take_rows(rows, chosen)
            for cohort, (rows, chosen) in enumerate(zip(self.clients, ids))
        )

    def put(
        self, ids: Participants, clients: tuple[PyTree, ...], following: Participants | None
    ) -> None:
        after = []
        for cohort, (old, chosen, new) in enumerate(zip(self.clients, ids, clients)):
            if self._is_all(cohort, chosen):
                after.append(new)
            elif not len(chosen):
                after.append(old)
            else:
                source = np.arange(len(chosen), dtype=np.int32)
                after.append(put_rows(old, new, source, chosen, np.int32(len(chosen))))
        self.clients = tuple(after)

    def look(self, server: PyTree, cohort: int, ids: np.ndarray) -> PyTree:
        rows = self.clients[cohort]
        in_order = np.array_equal(
            ids, np.arange(self._programs.specs[cohort].num_clients, dtype=np.int32)
        )
        return rows if in_order else take_rows(rows, ids)

    def freeze(self) -> Frozen:
        arrays = checkpoint.flatten(copy_tree(self.clients), ".clients")
        return Frozen(arrays, {"store": "device"}, {})

    def collect(self, kept: set[str]) -> None:
        """Nothing lies outside the checkpoints."""

"""Clients' examples: all of them on the device, or those that are asked for."""

import jax
import numpy as np

from h2tune_jax.run.programs import Programs, repeat_row, take_rows
from h2tune_jax.types import ClientData, PyTree


class Feed:
    """Hands out clients' data as device arrays.

    Args:
      programs: of the run.
      data: one entry a cohort, numpy leaves [C, n, ...]; rows that all clients share may be views.
      on_device: put all of it on the device once, on first use. Shared rows lie there once, and are
        repeated for those clients alone that are asked for.
    """

    def __init__(self, programs: Programs, data: tuple[ClientData, ...], *, on_device: bool):
        self._programs, self._data, self._on_device = programs, data, on_device
        self._here: dict[int, ClientData] = {}

    def take(self, cohort: int, ids: np.ndarray) -> ClientData:
        """Return the data of clients, leaves [len(ids), ...]."""
        data = self._data[cohort]
        if not self._on_device:
            return self._programs.place(jax.tree.map(lambda leaf: np.asarray(leaf)[ids], data))
        shared = is_repeated(data.examples)
        if cohort not in self._here:
            once = jax.tree.map(lambda leaf: leaf[:1], data.examples) if shared else data.examples
            self._here[cohort] = self._programs.place(data._replace(examples=once))
        here, count = self._here[cohort], data.num_examples.shape[0]
        if shared:
            counts = take_rows(here.num_examples, ids)
            return ClientData(repeat_row(here.examples, len(ids)), counts)
        if np.array_equal(ids, np.arange(count, dtype=np.int32)):
            return here
        return take_rows(here, ids)


def is_repeated(examples: PyTree) -> bool:
    """Say whether examples, leaves [C, n, ...], are views of one row [n, ...] that all clients share."""
    leaves = jax.tree.leaves(examples)
    views = [isinstance(leaf, np.ndarray) and leaf.strides[0] == 0 for leaf in leaves]
    return bool(leaves) and all(views) and len(leaves[0]) > 1

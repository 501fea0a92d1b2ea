"""Clients' examples: all of them on the device, or those that are asked for."""

import jax
import numpy as np

from h2tune_jax.run.programs import Programs, take_rows
from h2tune_jax.types import ClientData


class Feed:
    """Hands out clients' data as device arrays.

    Args:
      programs: of the run.
      data: one entry a cohort, numpy leaves [C, n, ...].
      on_device: put all of it on the device once, on first use.
    """

    def __init__(self, programs: Programs, data: tuple[ClientData, ...], *, on_device: bool):
        self._programs, self._data, self._on_device = programs, data, on_device
        self._here: dict[int, ClientData] = {}

    def take(self, cohort: int, ids: np.ndarray) -> ClientData:
        """Return the data of clients, leaves [len(ids), ...]."""
        data = self._data[cohort]
        if not self._on_device:
            return self._programs.place(jax.tree.map(lambda leaf: np.asarray(leaf)[ids], data))
        if cohort not in self._here:
            self._here[cohort] = self._programs.place(data)
        whole, count = self._here[cohort], data.num_examples.shape[0]
        if np.array_equal(ids, np.arange(count, dtype=np.int32)):
            return whole
        return take_rows(whole, ids)

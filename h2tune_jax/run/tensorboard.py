"""TensorBoard events of a run, written without TensorFlow."""

import time
from pathlib import Path
from typing import Any

from h2tune_jax.run.events import Observer, Started
from h2tune_jax.run.scalars import scalar_observer
from h2tune_jax.types import FederationError

_FLUSH_SECONDS = 5.0


def tensorboard(folder: str | Path | None = None) -> Observer:
    """Build an observer that writes events to `folder`; None means RUN/tensorboard.

    A resumed run adds a file, and what it repeats of an interrupted one replaces what was there.
    """
    # Imported before the run begins, so that a missing package is known at once.
    from tensorboardX import SummaryWriter

    writer: Any = None
    flushed = 0.0

    def begin(event: Started) -> None:
        nonlocal writer
        where = folder
        if where is None and event.folder is not None:
            where = event.folder / "tensorboard"
        if where is None:
            raise FederationError("tensorboard: a run without a folder needs tensorboard(folder)")
        writer = SummaryWriter(str(where), purge_step=event.first_round + 1)

    def write(scalars: dict[str, float], step: int) -> None:
        nonlocal flushed
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        if time.monotonic() - flushed > _FLUSH_SECONDS:
            writer.flush()
            flushed = time.monotonic()

    return scalar_observer("TensorBoard", begin=begin, write=write, end=lambda: writer.close())

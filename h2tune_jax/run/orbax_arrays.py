"""Arrays by path, written and read by Orbax."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from h2tune_jax.run.flat import Arrays


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from logging the errors that we report, with a page of traceback each."""
    refuse = lambda record: record.levelno < logging.ERROR
    logger = logging.getLogger("absl")
    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, none of them without elements, to a folder that is not there yet."""
    import orbax.checkpoint as ocp

    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
        saver.save(path.resolve(), args=ocp.args.PyTreeSave(dict(arrays)))


def restore_arrays(path: Path, names: Iterable[str]) -> Arrays:
    """Read the named arrays, as they are found: nothing here notices damage."""
    import orbax.checkpoint as ocp

    kinds = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path.resolve(), args=ocp.args.PyTreeRestore(restore_args=kinds))

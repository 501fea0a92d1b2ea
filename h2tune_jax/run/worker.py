"""One thread for what must not hold up the device: loading, storing and saving, in order."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Worker:
    """Runs tasks one after the other, in the order given.

    After a task has failed none is begun: what follows may build on it. The error is raised where the
    task's result is asked for, and by `check`.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="h2tune-run")
        self._error: BaseException | None = None

    def submit(self, task: Callable[..., Any], *args: Any) -> Future:
        """Queue a task."""

        def run() -> Any:
            if self._error is not None:
                raise self._error
            try:
                return task(*args)
            except BaseException as error:
                self._error = error
                raise

        return self._pool.submit(run)

    def check(self) -> None:
        """Raise what a task has raised."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for what is queued."""
        self._pool.shutdown(wait=True)

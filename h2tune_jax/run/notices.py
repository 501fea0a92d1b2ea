"""What a reader should know of a run: told to observers, printed where none of them shows it, and kept.

RUN/notices.jsonl has a line for each: what was skipped, where the run went on, whose results were left out.
Unlike metrics.jsonl it is never cut back: it tells what happened to the run, not what the run computed.
"""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from h2tune_jax.run.disk import sync_path, write_all, writing
from h2tune_jax.run.events import Event, Notice, Observer, tell
from h2tune_jax.run.folder import RunFolder
from h2tune_jax.run.records import encode, parse_line, whole_lines


def announce(
    folder: RunFolder | None,
    observers: tuple[Observer, ...],
    notice: Notice,
    *,
    once: bool = False,
) -> None:
    """Tell a notice, print it to standard error unless an observer shows it, and note it in the folder.

    An observer shows notices if it has the attribute `shows_notices`, and that is true. With `once` a
    text that is noted already is not noted again.
    """
    tell(observers, notice)
    if not any(getattr(observer, "shows_notices", False) for observer in observers):
        where = "" if folder is None else f"{folder.path}: "
        mark = "warning: " if notice.level == "warning" else ""
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # a closed terminal never ends a run
                print(f"h2tune: {where}{mark}{notice.text}", file=sys.stderr, flush=True)
    if folder is None or (once and notice.text in {line["text"] for line in read_notices(folder)}):
        return
    _append(folder.notices, {"wall": time.time(), "level": notice.level, "text": notice.text})


def _append(path: Path, record: dict[str, Any]) -> None:
    with writing(path.name, path):
        is_new = not path.exists()
        with path.open("a+b", buffering=0) as file:
            line = encode(record)
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill cut the last one short
                    line = b"\n" + line
            write_all(file, line)
            os.fsync(file.fileno())
        if is_new:
            sync_path(path.parent)


def read_notices(folder: RunFolder) -> list[dict[str, Any]]:
    """Read what was noted, oldest first; what a kill cut short is left out."""
    records = map(parse_line, whole_lines(folder.notices))
    return [record for record in records if record is not None and "text" in record]


class PassOn:
    """An observer that passes a run's notices on to others, with the run's name before them."""

    def __init__(self, name: str, observers: tuple[Observer, ...]):
        self._name, self._observers = name, observers

    @property
    def shows_notices(self) -> bool:
        """Whether one of the others shows them."""
        return any(getattr(observer, "shows_notices", False) for observer in self._observers)

    def __call__(self, event: Event) -> None:
        """Pass a notice on; nothing else."""
        if isinstance(event, Notice):
            text = f"{self._name}: {event.text}"
            tell(self._observers, event._replace(text=text))

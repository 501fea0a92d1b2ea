"""What the loop tells those who watch a run.

An observer is a function `event -> None`. The loop calls observers in order, between rounds and after
the next round was handed to the device: they read, and change nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Started(NamedTuple):
    """A run begins, or goes on."""

    config: Any
    federation: Any
    folder: Path | None
    first_round: int  # the round that runs next
    total_rounds: int


class RoundDone(NamedTuple):
    """A round is over and its metrics are here; both dicts are as their files hold them."""

    record: dict[str, Any]  # a line of metrics.jsonl
    timing: dict[str, Any]  # a line of timings.jsonl


class Saved(NamedTuple):
    """A checkpoint is complete on the disk."""

    round: int  # how many rounds it holds
    seconds: float
    size: int  # bytes that were written for it


class Notice(NamedTuple):
    """Something that the reader should know."""

    text: str
    level: str = "info"  # or "warning"


class Finished(NamedTuple):
    """The run is over, or was asked to stop; all that it wrote is on the disk."""

    reason: str  # "complete", "early stop" or "interrupted"
    rounds: int  # how many are done
    folder: Path | None


Event = Started | RoundDone | Saved | Notice | Finished
Observer = Callable[[Event], None]


def tell(observers: tuple[Observer, ...], event: Event) -> None:
    """Call every observer with an event."""
    for observer in observers:
        observer(event)

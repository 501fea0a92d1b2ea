"""Time on the device, by the host's clock round long enough queues of work."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

__all__ = ["Timing", "device_time"]


class Timing(NamedTuple):
    """Microseconds per call: the median of several rounds, and their spread."""

    median: float
    low: float
    high: float


def device_time(
    fn: Callable[..., Any], sets: Sequence[tuple[Any, ...]], *, rounds: int = 7, calls: int = 3
) -> Timing:
    """Time `fn` over several sets of inputs, which together should outgrow the cache.

    One program runs fn on every set in turn: a barrier between them keeps the compiler from merging
    or reordering them, and one dispatch serves all, so that small work is not measured as launches
    from Python. `calls` programs are queued per round, and the round waits for the last.
    """

    def chain(sets: Any) -> Any:
        outs, previous = [], ()
        for args in sets:
            args, previous = jax.lax.optimization_barrier((args, previous))
            previous = fn(*args)
            outs.append(previous)
        return outs

    program = jax.jit(chain).lower(list(sets)).compile()
    for _ in range(2):
        jax.block_until_ready(program(list(sets)))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = program(list(sets))
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / (calls * len(sets)))
    scaled = [1e6 * s for s in seconds]
    return Timing(statistics.median(scaled), min(scaled), max(scaled))

"""Measuring this machine: clients and tokens a second, compile time, memory, share of the peak rate.

    python -m h2tune_jax.bench --quick

`docs/throughput.md` holds measured tables, `docs/profiling.md` says how to see where time goes.
"""

from h2tune_jax.bench.command import main

__all__ = ["main"]

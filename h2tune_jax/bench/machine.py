"""The machine under measurement: what it is, what memory it has left, and how fast it multiplies."""

import importlib.metadata
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.run import memory


class Spread(NamedTuple):
    """Several runs: their median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Return the median and the quartiles of one value or more."""
    low, high = np.percentile(values, [25, 75])
    return Spread(statistics.median(values), float(low), float(high))


def describe() -> dict[str, Any]:
    """Name the machine and the versions, as columns of a row. Starts the backend."""
    device = jax.devices()[0]
    return {
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(total_memory() / 1e9, 1),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": _version("jaxlib"),
        "h2tune_jax": _version("h2tune-jax"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def total_memory() -> int:
    """Bytes of the first device's memory."""
    device = jax.devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes of the first device's memory that are not in use; all of it where that is not known."""
    known = memory.free_memory()
    return total_memory() if known is None else known


def reset_peak() -> None:
    """Forget the process's peak of resident memory, where the system lets it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then the peak is that of the whole process: never too small


def peak_memory() -> int | None:
    """Peak bytes: of the device's allocator, or of this process's resident memory on the CPU."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats()
        return stats.get("peak_bytes_in_use") if stats else None
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None


def matrix_peak(dtype: str, *, size: int | None = None, runs: int = 7) -> Spread:
    """Measure the rate of one large matrix product, in operations a second, on one device."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    chain = 2 if jax.default_backend() == "cpu" else 20  # one dispatch for all
    scale = jnp.asarray(size**-0.5, dtype)
    left = jnp.full((size, size), 0.5, dtype) + jnp.eye(size, dtype=dtype)

    @jax.jit
    def multiply(left, right):
        return jax.lax.fori_loop(0, chain, lambda _, x: (left @ x) * scale, right)

    right = jax.block_until_ready(multiply(left, left))
    rates = []
    for _ in range(runs):
        began = time.perf_counter()
        right = jax.block_until_ready(multiply(left, left))
        rates.append(2 * chain * size**3 / (time.perf_counter() - began))
    del right
    return spread(rates)

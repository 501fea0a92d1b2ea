"""What memory is free where a run would go."""

import os
from pathlib import Path

import jax

MEMINFO = Path("/proc/meminfo")  # of Linux


def free_memory() -> int | None:
    """Return the free bytes of the first device; of a CPU, of the machine. None if unknown.

    On Linux a machine's are those that it can give without swapping: a cache of files is not in use.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        found = device.memory_stats() or {}
        limit = found.get("bytes_limit")
        return None if limit is None else limit - found.get("bytes_in_use", 0)
    for line in MEMINFO.read_text().splitlines() if MEMINFO.is_file() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return None

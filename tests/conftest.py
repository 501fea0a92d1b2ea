"""Strictness for every test, and eight virtual devices for those that shard."""

import gc
import os
from pathlib import Path

# The tests compile far more than they compute.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# What was compiled once is read back by the other worker and by the next run; `make clean`
# removes it.
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items):
    """Keep a file's fast tests on one worker, so that what they compile is compiled once."""
    for item in items:
        alone = item.get_closest_marker("slow") or item.get_closest_marker("xdist_group")
        if not alone:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Compiled programs of hundreds of tests would fill the memory."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def cpu_devices():
    devices = jax.devices("cpu")
    if len(devices) < 8:
        pytest.skip("the CPU backend was started with fewer than 8 virtual devices")
    return devices

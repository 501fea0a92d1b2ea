"""Strictness for every test, and eight virtual devices for those that shard."""

import os

# The tests compile far more than they compute.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def cpu_devices():
    devices = jax.devices("cpu")
    if len(devices) < 8:
        pytest.skip("the CPU backend was started with fewer than 8 virtual devices")
    return devices

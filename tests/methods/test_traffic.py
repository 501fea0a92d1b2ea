"""Counts of what travels are exact, and do not overflow where a model has billions of numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2tune_jax.methods.traffic import Units, numbers, traffic


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_sizes():
    small = numbers({"a": like(2, 5), "b": like(7)})
    assert small.dtype == jnp.int32
    assert int(small) == 17
    assert int(numbers(())) == 0
    large = numbers({"a": like(96, 4096, 11008), "b": like(7)})
    np.testing.assert_allclose(float(large), 96 * 4096 * 11008 + 7, rtol=1e-7)


def test_bytes_are_those_of_each_array():
    up = {"factor": like(2, 5, dtype=jnp.bfloat16), "ids": like(3, dtype=jnp.int32)}
    down = Units(jnp.array(2), {"tokens": like(4, dtype=jnp.int32), "mask": like(4, dtype=bool)}, 3)
    seen = {name: int(count) for name, count in traffic(up=up, down=down).items()}
    assert seen == {"numbers_up": 13, "numbers_down": 16, "bytes_up": 32, "bytes_down": 40}


@pytest.mark.parametrize("each", [5, 3_000_000_001])
def test_units_run_through_programs(each):
    units = np.array([0, 1, 2000], np.int32)
    count = lambda n: numbers((Units(n, like(each), 2000), like(3)))
    counts = jax.jit(jax.vmap(count))(units)
    assert counts.dtype == (jnp.int32 if each == 5 else jnp.float32)
    np.testing.assert_allclose(np.asarray(counts, float), units * float(each) + 3, rtol=1e-7)

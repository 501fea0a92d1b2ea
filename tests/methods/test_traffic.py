"""Counts of what travels do not overflow where a model has billions of numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2tune_jax.methods.traffic import count_units, size


def test_sizes():
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    small = size({"a": like(2, 5), "b": like(7)})
    assert small.dtype == jnp.int32
    assert int(small) == 17
    assert int(size(())) == 0
    large = size({"a": like(96, 4096, 11008), "b": like(7)})
    np.testing.assert_allclose(float(large), 96 * 4096 * 11008 + 7, rtol=1e-7)


@pytest.mark.parametrize("each", [5, 3_000_000_001])
def test_units_run_through_programs(each):
    units = np.array([0, 1, 2000], np.int32)
    counts = jax.jit(jax.vmap(lambda n: count_units(n, each, most=2000)))(units)
    assert counts.dtype == (jnp.int32 if each == 5 else jnp.float32)
    np.testing.assert_allclose(np.asarray(counts, float), units * float(each), rtol=1e-7)

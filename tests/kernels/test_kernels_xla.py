"""The plain XLA path: the same table, the same derivative and batching rules."""

import jax
import jax.numpy as jnp
import kernel_checks
import numpy as np
import pytest
from h2tune_kernels import (
    scatter_core_ref,
    sparse_core_ref,
    triple_matmul,
    triple_matmul_ref,
    triple_matmul_sparse_ref,
)
from kernel_cases import CASES, TOLERANCE, Case, error, oracle


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_forward_and_every_gradient(case, dtype):
    errors = kernel_checks.errors(case, dtype, "xla", None)
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE[dtype]} == {}


def test_ranks_are_clipped():
    case = Case(3, 9, 24, 18, 20, size=21, ranks=(32, 20, -1))
    errors = kernel_checks.errors(case, "float32", "xla", None)
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE["float32"]} == {}


@pytest.mark.parametrize(("kernels", "sparse"), [("xla", False), ("xla", True), ("auto", True)])
def test_transformations(kernels, sparse):
    errors = kernel_checks.same_under_transforms(kernels, None, sparse)
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE["float32"]} == {}


def test_gather_and_scatter():
    kernel_checks.core_round_trip("xla")


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=lambda case: case.name)
def test_references_are_the_definition(case):
    arrays, values = kernel_checks.operands(case, "float32")
    expected = oracle(case, values)["y"]
    for c in range(case.clients):
        x, a, b, scale, bias = (arrays[k][c] for k in ("x", "a", "b", "scale", "bias"))
        common = {"scale": scale, "bias": bias, "residual": case.residual}
        if case.size:
            middle, index = arrays["middle"][c], arrays["index"][c]
            y = triple_matmul_sparse_ref(x, arrays["w"], a, middle, index, b, **common)
            core = sparse_core_ref(middle, index)
            back = scatter_core_ref(core, index, case.size).reshape(-1)
            np.testing.assert_array_equal(back[index], middle.reshape(-1)[index])
            assert int(jnp.count_nonzero(back)) <= case.r**2
        else:
            y = triple_matmul_ref(x, arrays["w"], a, arrays["core"][c], b, **common)
        assert error(y, expected[c], False) <= TOLERANCE["float32"]


def test_leading_axes_are_rows():
    case = Case(1, 12, 10, 14, 3)
    arrays, _ = kernel_checks.operands(case, "float32")
    x, a, core, b = (arrays[k][0] for k in ("x", "a", "core", "b"))
    flat = triple_matmul(x, arrays["w"], a, core, b, scale=0.5)
    shaped = triple_matmul(x.reshape(2, 3, 2, 10), arrays["w"], a, core, b, scale=0.5)
    np.testing.assert_array_equal(shaped.reshape(12, 14), flat)
    one = triple_matmul(x[4], arrays["w"], a, core, b, scale=0.5)
    np.testing.assert_allclose(one, flat[4], rtol=1e-6)


def test_frozen_weight_and_scale_get_zero_gradients():
    case = Case(1, 12, 10, 14, 3)
    arrays, _ = kernel_checks.operands(case, "float32")
    x, a, core, b = (arrays[k][0] for k in ("x", "a", "core", "b"))

    def loss(w, scale):
        return jnp.sum(triple_matmul(x, w, a, core, b, scale=scale))

    dw, dscale = jax.grad(loss, argnums=(0, 1))(arrays["w"], jnp.float32(0.5))
    assert not dw.any()
    assert not dscale.any()


@pytest.mark.parametrize("ranks", [None, 2])
def test_dropout_thins_the_adapter_alone(ranks):
    """Against the definition with the same mask: value and gradients."""
    case = Case(1, 40, 6, 5, 3)
    arrays, _ = kernel_checks.operands(case, "float32")
    w, key, rate = arrays["w"], jax.random.key(7), 0.25
    trained = [arrays[k][0] for k in ("x", "a", "core", "b")]
    live = 3 if ranks is None else ranks

    def ours(x, a, core, b):
        extra = {"dropout_rate": rate, "dropout_key": key, "ranks": ranks}
        y = triple_matmul(x.reshape(4, 10, 6), w, a, core, b, scale=2.0, **extra)
        return jnp.sum(jnp.sin(y))

    def wanted(x, a, core, b):
        keep = jax.random.bernoulli(key, 1.0 - rate, (4, 10, 6)).reshape(40, 6)
        thinned = jnp.where(keep, x / (1.0 - rate), 0.0)
        a, core, b = a[:, :live], core[:live, :live], b[:live]
        adapter = triple_matmul_ref(thinned, jnp.zeros_like(w), a, core, b, scale=2.0)
        return jnp.sum(jnp.sin(x @ w + adapter))

    got = jax.value_and_grad(ours, argnums=(0, 1, 2, 3))(*trained)
    want = jax.value_and_grad(wanted, argnums=(0, 1, 2, 3))(*trained)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=2e-5, atol=2e-5), got, want)
    with pytest.raises(ValueError, match="needs a dropout_key"):
        triple_matmul(*trained[:1], w, *trained[1:], scale=2.0, dropout_rate=rate)

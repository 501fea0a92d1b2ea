"""The compiled kernels on a CUDA device: the same table against the same float64 oracle."""

import os

import jax
import jax.numpy as jnp
import kernel_checks
import numpy as np
import pytest
from h2tune_kernels import launch
from kernel_cases import CASES, TOLERANCE, Case

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu():
    if jax.default_backend() != "gpu" or not launch.available():
        # `make gpu` sets this: there, a machine without a working GPU must fail and not skip.
        assert "H2TUNE_REQUIRE_GPU" not in os.environ, "no CUDA device, or jax_triton is missing"
        pytest.skip("needs a CUDA device, and jax_triton beside it")
    # JAX's own float32 products would otherwise run in tf32 here.
    with jax.default_matmul_precision("highest"):
        yield


TABLE = [(case, "around", "bfloat16") for case in CASES]
TABLE += [(case, "fused", "bfloat16") for case in CASES if case.r <= 64 and not case.ranks]
TABLE += [(case, "inplace", "bfloat16") for case in (CASES[1], CASES[5])]
# Float32 runs as three tf32 products here, float16 as in the interpreter.
TABLE += [(CASES[i], "around", dtype) for i in (1, 5, 6) for dtype in ("float32", "float16")]
# Large enough for every configuration of the block table: pipelines run full, grids in waves.
LARGE = (
    (Case(3, 300, 512, 768, 16, bias=True), "fused"),
    (Case(3, 300, 512, 768, 16, size=64), "around"),
    (Case(16, 64, 640, 520, 32), "fused"),
    (Case(2, 257, 520, 1032, 64, size=128), "fused"),
    (Case(2, 257, 520, 1032, 128, size=128), "around"),
    (Case(1, 4100, 512, 520, 8), "around"),
    (Case(6, 200, 384, 1536, 64, ranks=(4, 64, 8, 33, 16, 64)), "inplace"),
    (Case(4, 128, 384, 1536, 8), None),
)


@pytest.mark.parametrize(
    ("case", "plan", "dtype"), TABLE, ids=[f"{c.name}-{p}-{d}" for c, p, d in TABLE]
)
def test_forward_and_every_gradient(case, plan, dtype):
    errors = kernel_checks.errors(case, dtype, "triton", plan)
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize(("case", "plan"), LARGE, ids=[f"{c.name}-{p}" for c, p in LARGE])
def test_table_configurations(case, plan):
    errors = kernel_checks.errors(case, "bfloat16", "triton", plan)
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE["bfloat16"]} == {}


@pytest.mark.parametrize("plan", ["around", "inplace", "fused"])
def test_same_bits_every_run(plan):
    case = Case(3, 600, 256, 320, 16, size=64)
    arrays, _ = kernel_checks.operands(case, "bfloat16")
    trained, fixed = kernel_checks.split(case, arrays)
    axes = (kernel_checks.axes(case, trained), kernel_checks.axes(case, fixed))
    loss = kernel_checks.product(case, "triton", plan)
    fn = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), in_axes=axes))
    first, second = fn(trained, fixed), fn(trained, fixed)
    jax.tree.map(
        lambda p, q: np.testing.assert_array_equal(
            np.asarray(p.astype(jnp.float32)), np.asarray(q.astype(jnp.float32))
        ),
        first,
        second,
    )


def test_auto_launches_the_kernels():
    case = Case(4, 64, 256, 512, 16)
    arrays, _ = kernel_checks.operands(case, "bfloat16")
    trained, fixed = kernel_checks.split(case, arrays)
    axes = (kernel_checks.axes(case, trained), kernel_checks.axes(case, fixed))
    text = {}
    for kernels in ("auto", "xla"):
        loss = kernel_checks.product(case, kernels, "around")
        fn = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), in_axes=axes))
        text[kernels] = fn.lower(trained, fixed).compile().as_text()
    assert text["auto"].count("triton_kernel_call") >= 7
    assert "triton_kernel_call" not in text["xla"]
    assert "bf16[4,256,512]" not in text["auto"], "W was copied per client"


def test_transformations():
    errors = kernel_checks.same_under_transforms("triton", "around", True)
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE["float32"]} == {}


def test_gather_and_scatter():
    kernel_checks.core_round_trip("triton")

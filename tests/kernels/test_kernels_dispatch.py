"""One switch: what it accepts, what it refuses, and what it imports."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from h2tune_kernels import (
    blocks,
    launch,
    scatter_core,
    sparse_core,
    triple_matmul,
    triple_matmul_sparse,
)


def operands(n=4, d=6, f=5, r=2):
    key = jax.random.key(0)
    shapes = ((n, d), (d, f), (d, r), (r, r), (r, f))
    return [jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes)]


@pytest.fixture
def _no_cuda():
    if launch.available():
        pytest.skip("jax_triton is installed here: test_kernels_lowering covers the refusal")


@pytest.mark.usefixtures("_no_cuda")
def test_explicit_triton_without_cuda_is_an_error():
    index = jnp.arange(4, dtype=jnp.int32)
    with pytest.raises(RuntimeError, match="kernels='triton' was asked for"):
        triple_matmul(*operands(), scale=1.0, kernels="triton")
    x, w, a, _, b = operands()
    with pytest.raises(RuntimeError, match="kernels='triton' was asked for"):
        triple_matmul_sparse(x, w, a, jnp.ones((3, 3)), index, b, scale=1.0, kernels="triton")
    with pytest.raises(RuntimeError, match="kernels='triton' was asked for"):
        sparse_core(jnp.ones((3, 3)), index, kernels="triton")
    with pytest.raises(RuntimeError, match="kernels='triton' was asked for"):
        scatter_core(jnp.ones((2, 2)), index, 3, kernels="triton")


def test_unknown_switch_is_an_error():
    with pytest.raises(ValueError, match="'auto', 'triton' or 'xla'"):
        triple_matmul(*operands(), scale=1.0, kernels="cuda")


def test_dropout_with_triton_is_an_error():
    with pytest.raises(ValueError, match="dropout is not fused"):
        triple_matmul(
            *operands(), scale=1.0, kernels="triton", dropout_rate=0.1,
            dropout_key=jax.random.key(0),
        )  # fmt: skip


def test_shapes_that_do_not_go_together_are_errors():
    x, w, a, core, b = operands()
    with pytest.raises(ValueError, match="do not go together"):
        triple_matmul(x[:, :5], w, a, core, b, scale=1.0)
    with pytest.raises(ValueError, match="where a has rank 2"):
        triple_matmul(x, w, a, core[:1], b, scale=1.0)
    with pytest.raises(ValueError, match="no square"):
        triple_matmul_sparse(x, w, a, core, jnp.arange(3, dtype=jnp.int32), b, scale=1.0)
    with pytest.raises(ValueError, match="both are in the compute dtype"):
        triple_matmul(x.astype(jnp.bfloat16), w, a, core, b, scale=1.0)
    with pytest.raises(ValueError, match="above 128"):
        triple_matmul(*operands(r=129), scale=1.0)


def test_import_is_light():
    code = (
        "import sys, h2tune_kernels; "
        "assert not {'triton', 'jax_triton', 'torch'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_table_rows_are_found_and_shadow_the_default(monkeypatch):
    problem = blocks.Problem("NVIDIA H200", clients=4, n=512, k=2048, f=0, r=9, itemsize=2)
    general = blocks.blocks_for("down", problem)
    row = {"device": "sm_90", "kernel": "down", "width": 16, "blocks": general._asdict()}
    exact = row | {"device": "NVIDIA H200", "n": 512, "k": 2048}
    exact["blocks"] = general._replace(rows=128)._asdict()
    monkeypatch.setattr(blocks, "read_table", lambda: (exact, row))
    assert blocks.blocks_for("down", problem).rows == 128
    assert blocks.blocks_for("down", problem._replace(n=513)) == general
    unknown = problem._replace(device="some other card")
    assert blocks.blocks_for("down", unknown) == blocks._default("down", unknown)


def test_plans_respect_what_they_cannot_do(monkeypatch):
    problem = blocks.Problem("sm_90", clients=4, n=512, k=384, f=1536, r=8, itemsize=2)
    monkeypatch.setattr(blocks, "read_table", tuple)
    assert blocks.plan_for(problem, ragged=False, shared_x=False) == "fused"
    assert blocks.plan_for(problem, ragged=True, shared_x=False) == "around"
    assert blocks.plan_for(problem._replace(itemsize=4), ragged=False, shared_x=False) == "around"
    wide = problem._replace(k=4096)
    assert blocks.plan_for(wide, ragged=False, shared_x=False) == "around"
    rows = ({"device": "sm_90", "kernel": "plan", "width": 16, "k": 4096, "plan": "inplace"},)
    monkeypatch.setattr(blocks, "read_table", lambda: rows)
    assert blocks.plan_for(wide, ragged=False, shared_x=False) == "inplace"
    assert blocks.plan_for(wide, ragged=False, shared_x=True) == "around"

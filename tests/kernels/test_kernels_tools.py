"""The tuner and the benchmark, as far as they go without a GPU."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from h2tune_kernels import aot, blocks, timing, tune

BENCHMARKS = pathlib.Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("kernel_benchmark", BENCHMARKS / "triple.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_benchmark"] = module
    spec.loader.exec_module(module)
    return module


def test_device_time_tells_more_work_from_less():
    sets = [(jnp.full((300, 300), float(i)),) for i in range(2)]
    little = timing.device_time(lambda a: a + 1.0, sets, rounds=3)
    much = timing.device_time(lambda a: a @ a @ a @ a @ a, sets, rounds=3)
    assert 0 < little.low <= little.median <= little.high
    assert much.median > little.median


def test_tuner_keeps_the_fastest_and_the_table_finds_it(monkeypatch, tmp_path):
    """With made-up times, the winner of each kernel and plan ends up in front of the table."""
    trials = []

    def made_up(fn, sets, *, rounds=0):
        jax.eval_shape(fn, *sets[0])  # what would be timed traces, down to its launches
        table = fn.args[0] if hasattr(fn, "args") else None
        if table is None:  # a plan: `whole` carries its name as a default
            plan = fn.__defaults__[0]
            return timing.Timing({"around": 5.0, "inplace": 3.0, "fused": 9.0}[plan], 0, 0)
        row = table[0]
        trials.append(row["kernel"])
        if row["blocks"]["num_stages"] == 5:
            raise RuntimeError("out of shared memory")
        wanted = row["blocks"]["rows"] in (0, 128) and row["blocks"]["step"] in (0, 64)
        return timing.Timing(1.0 if wanted else 2.0, 0, 0)

    recorder = aot._Recorder()
    monkeypatch.setattr(tune.launch, "cuda_launcher", recorder)
    monkeypatch.setattr(tune, "device_time", made_up)
    shape = (2, 16, 32, 48, 4)
    rows = tune.tune_shape(shape, "NVIDIA H200", time.monotonic() + 60)
    assert {"down", "up", "outer", "fused"} == set(trials)
    launched = {v.launch.kernel.fn.__name__.removesuffix("_kernel") for v in recorder.variants}
    assert launched == set(trials)
    path = tmp_path / "blocks.json"
    path.write_text(json.dumps({"rows": list(blocks.read_table())}))
    tune.write_table(path, rows)
    tune.write_table(path, rows)  # again: replaces, does not pile up
    table = tuple(json.loads(path.read_text())["rows"])
    assert len(table) == len(rows) + len(blocks.read_table())
    problem = blocks.Problem("NVIDIA H200", clients=2, n=16, k=48, f=0, r=4, itemsize=2)
    found = blocks.blocks_for("down", problem, table)
    assert (found.rows, found.step) == (128, 64)
    product = problem._replace(k=48, f=32)
    assert blocks.plan_for(product, ragged=False, shared_x=False, table=table) == "inplace"
    other = problem._replace(device="sm_80")
    assert blocks.blocks_for("down", other, table) == blocks.blocks_for("down", other)


@pytest.mark.parametrize("kernel", ["down", "up", "outer", "fused"])
@pytest.mark.parametrize("r", [1, 16, 64])
def test_candidates_are_distinct(kernel, r):
    found = list(tune.candidates(kernel, r))
    assert len(found) == len(set(found)) >= 4


def test_tuner_and_benchmark_refuse_without_a_gpu(tmp_path):
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    for command in (
        ["-m", "h2tune_kernels.tune"],
        [str(BENCHMARKS / "triple.py"), "--out", str(tmp_path)],
    ):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 1
        assert "needs a CUDA device" in done.stderr


def test_benchmark_forms_agree(bench):
    """(a) and the floor (b) are what they say: the definition, and x W."""
    s = bench.Shape(2, 6, 8, 10, 3)
    x, w, a, core, b, dy = (v.astype(jnp.float32) for v in bench.draw(s, 0))
    mixed = np.eye(3) + np.asarray(core)
    weight = np.asarray(w) + 2.0 * np.asarray(a) @ mixed @ np.asarray(b)
    y, (dx, da, dcore, db) = bench.with_gradients(bench.einsum_form, True)(x, w, a, core, b, dy)
    np.testing.assert_allclose(y, np.asarray(x) @ weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, np.asarray(dy) @ weight.transpose(0, 2, 1), rtol=1e-4, atol=1e-3)
    assert (da.shape, dcore.shape, db.shape) == (a.shape, core.shape, b.shape)
    y, pulled = bench.with_gradients(bench.base_form, False)(x, w, a, core, b, dy)
    np.testing.assert_allclose(y, np.asarray(x @ w), rtol=1e-5, atol=1e-5)
    assert len(pulled) == 1


def test_benchmark_counts_by_hand(bench):
    s = bench.Shape(2, 3, 5, 7, 2)
    base, adapter = bench.operations(s)
    assert base == 2 * (2 * 6 * 5 * 7)
    # u, z, zB | g, du, du A^T | x^T du, u^T g, z^T dy
    per_token = 5 * 2 + 2 * 2 + 2 * 7 + 7 * 2 + 2 * 2 + 2 * 5 + 5 * 2 + 2 * 2 + 2 * 7
    assert adapter == 2 * 6 * per_token


def test_benchmark_verdicts(bench):
    def row(**changes):
        values = {
            **bench.Shape(64, 64, 2048, 2048, 16)._asdict(), "ours_us": 110.0, "einsum_us": 130.0,
            "base_us": 100.0, "torch_us": "", "ours_over_einsum": 110 / 130, "ours_cost": 0.10,
            "einsum_cost": 0.30,
        }  # fmt: skip
        return values | changes

    text = bench.summary([row(), row(r=64)], {})
    assert text.count(": met") == 3
    bad = row(ours_us=140.0, ours_over_einsum=140 / 130, ours_cost=0.40)
    assert bench.summary([bad], {}).count("NOT met") == 3
    assert math.isclose(bench.geometric([0.25, 1.0]), 0.5)

"""What the CUDA program looks like, lowered on a machine without a GPU.

jax_triton imports only beside a CUDA plugin of JAX. The plugin's wheel alone, without the CUDA
libraries it would need to run, is enough to lower; it is fetched once into assets/ and used in a
process of its own.
"""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
WHEELS = (f"jax-cuda12-plugin=={importlib.metadata.version('jaxlib')}", "jax-triton==0.3.1")

PROGRAM = r"""
import json, re, sys
import jax, jax.numpy as jnp
from h2tune_kernels import triple_matmul, triple_matmul_sparse

C, n, D, F, r, R = 6, 40, 256, 328, 8, 24
spec = jax.ShapeDtypeStruct
shapes = {
    "w": spec((D, F), jnp.bfloat16), "x": spec((C, n, D), jnp.bfloat16),
    "a": spec((C, D, r), jnp.float32), "core": spec((C, r, r), jnp.float32),
    "middle": spec((C, R, R), jnp.float32), "index": spec((C, r * r), jnp.int32),
    "b": spec((C, r, F), jnp.float32), "ranks": spec((C,), jnp.int32),
}
def build(kernels, plan, sparse, ragged, platform):
    def loss(t, w, index, ranks):
        extra = dict(scale=0.5, kernels=kernels, plan=plan, ranks=ranks if ragged else None)
        if sparse:
            y = triple_matmul_sparse(t["x"], w, t["a"], t["middle"], index, t["b"], **extra)
        else:
            y = triple_matmul(t["x"], w, t["a"], t["core"], t["b"], **extra)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))
    trained = {k: shapes[k] for k in ("x", "a", "b", "middle" if sparse else "core")}
    fn = jax.vmap(jax.grad(loss), in_axes=(0, None, 0, 0))
    args = (trained, shapes["w"], shapes["index"], shapes["ranks"])
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()

out = {}
for kernels, plan, sparse, ragged in (
    ("auto", None, True, False), ("auto", "around", False, True), ("triton", "fused", True, False),
    ("triton", "inplace", False, False), ("triton", "around", True, False),
    ("xla", None, True, False),
):
    text = build(kernels, plan, sparse, ragged, "cuda")
    big = [
        [int(d) for d in m.group(1).split("x")[:-1]]
        for m in re.finditer(r"broadcast_in_dim.*-> tensor<(\S+)>", text)
    ]
    out[f"{kernels} {plan} {sparse} {ragged}"] = {
        "calls": len(re.findall(r"custom_call @triton_kernel_call", text)),
        "broadcasts": big,
        "weights": re.findall(rf"tensor<(?:\d+x)+{D}x{F}xbf16>", text),
        "transposed": re.findall(rf"transpose.*tensor<(?:1x)?{F}x{D}xbf16>", text),
        "aliased": text.count("#stablehlo.output_operand_alias<"),
    }
out["auto on cpu"] = build("auto", None, True, False, "cpu").count("triton_kernel_call")
try:
    build("triton", None, True, False, "cpu")
    out["refusal"] = ""
except NotImplementedError as refusal:
    out["refusal"] = str(refusal)
one = jax.jit(
    lambda t, w: triple_matmul(t["x"][0], w, t["a"][0], t["core"][0], t["b"][0], scale=1.0)
).trace({k: shapes[k] for k in ("x", "a", "core", "b")}, shapes["w"])
out["one trace"] = [
    one.lower(lowering_platforms=(platform,)).as_text().count("custom_call @triton_kernel_call")
    for platform in ("cuda", "cpu", "tpu")
]
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def lowered():
    cache = ROOT / "assets" / "cuda-plugin" / "-".join(WHEELS).replace("==", "-")
    if not cache.is_dir():
        cache.parent.mkdir(parents=True, exist_ok=True)
        fresh = pathlib.Path(tempfile.mkdtemp(dir=cache.parent))
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        install += ["--disable-pip-version-check", "--target", str(fresh), *WHEELS]
        done = subprocess.run(install, capture_output=True, text=True, timeout=300)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            shutil.rmtree(fresh)
            pytest.skip(f"jax_triton needs the wheels {WHEELS}, which cannot be had: {reason}")
        # Whole or not at all, and the first of several processes wins.
        try:
            fresh.rename(cache)
        except OSError:
            shutil.rmtree(fresh)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(cache), str(ROOT / "kernels")]),
        "H2TUNE_KERNELS_TARGET": "sm_90",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("program", "calls"),
    [
        # forward: down, up; backward: down, up, three outer, and one scatter where M is trained.
        # This small shape takes the fused plan by itself.
        ("auto None True False", 1 + 4 + 1),
        ("auto around False True", 2 + 5),
        ("triton around True False", 2 + 5 + 1),
        ("triton inplace False False", 2 + 5),
        ("triton fused True False", 1 + 4 + 1),
        ("xla None True False", 0),
    ],
)
def test_vmap_grad_is_custom_calls_and_w_stays_single(lowered, program, calls):
    found = lowered[program]
    assert found["calls"] == calls
    assert set(found["weights"]) <= {"tensor<1x256x328xbf16>"}
    assert found["transposed"] == []
    assert not [shape for shape in found["broadcasts"] if shape[-2:] == [256, 328]]


def test_inplace_aliases_its_buffer(lowered):
    assert lowered["triton inplace False False"]["aliased"] == 2
    assert lowered["triton around True False"]["aliased"] == 0


def test_one_trace_is_right_on_every_platform(lowered):
    assert lowered["auto on cpu"] == 0
    assert lowered["one trace"] == [1, 0, 0]
    assert "kernels='triton' runs on CUDA only" in lowered["refusal"]
    assert "built for cpu" in lowered["refusal"]

"""Where programs stand on a grid: what CUDA takes of one, and which programs are neighbours."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from h2tune_kernels import aot
from h2tune_kernels.core import gather_launch, scatter_launch
from h2tune_kernels.launch import grid_of

# Each output starts as NaN. Cut to the first client's share of programs, a launch has to write that
# client whole and no other.
PROGRAM = r"""
import collections, dataclasses, json
import jax, jax.numpy as jnp
import numpy as np
from h2tune_kernels import core, interpret, triple_launch

C, n, D, F, r, R = 3, 70, 40, 300, 33, 40
found = collections.defaultdict(list)

def written(launch, programs, operands):
    short = dataclasses.replace(launch, grid=(programs,), aliases={})
    outs = interpret.interpreter_launcher(short, *operands)
    return [~np.isnan(np.asarray(out)) for out in outs]

def launcher(launch, *operands):
    name, (programs,) = launch.kernel.fn.__name__, launch.grid
    share = programs // C
    for out in written(launch, share, operands):
        out = np.moveaxis(out, out.shape.index(C), 0)
        found[name].append([share, bool(out[0].all()), bool(out[1:].any())])
    if name == "up_kernel":
        rows = launch.blocks.rows
        (y,) = written(launch, share // -(-n // rows), operands)
        found["up_kernel, one row of tiles"].append(
            [rows, bool(y[0, :rows].all()), bool(y[0, rows:].any() or y[1:].any())]
        )
    return interpret.interpreter_launcher(launch, *operands)

keys = iter(jax.random.split(jax.random.key(0), 9))
draw = lambda *shape: jax.random.normal(next(keys), shape)
o = triple_launch.Operands(
    x=draw(C, n, D), w=draw(1, D, F), a=draw(C, D, r), core=draw(C, r, r), positions=None,
    b=draw(C, r, F), bias=None, scale=jnp.ones((1,)), ranks=None,
)
settings = dict(launcher=launcher, device="none", residual=True, plan="around")
y, u, z = triple_launch.forward(o, **settings)
triple_launch.backward(o, u, z, y, **settings)
index = jnp.tile(jnp.arange(r * r, dtype=jnp.int32), (C, 1))
core.scatter_launch(launcher, core.gather_launch(launcher, draw(C, R * R), index), index, R)
print(json.dumps(found))
"""


def launches(clients, n):
    """Every launch there is, for so many clients with so many rows each."""
    recorder = aot._Recorder()
    shape = {"device": "sm_90", "clients": clients, "n": n, "d": 40, "f": 300, "r": 8}
    for plan in ("around", "inplace", "fused"):
        recorder.variants += aot.variants(**shape, plan=plan)

    def core(middle, index):
        return scatter_launch(recorder, gather_launch(recorder, middle, index), index, 200)

    spec = jax.ShapeDtypeStruct
    jax.eval_shape(core, spec((clients, 200 * 200), jnp.float32), spec((clients, 64), jnp.int32))
    return [variant.launch for variant in recorder.variants]


@pytest.mark.parametrize(
    ("clients", "n"), [(100_000, 3), (1, 5_000_000)], ids=["many clients", "many rows"]
)
def test_no_axis_is_longer_than_cuda_takes(clients, n):
    limits = (2**31 - 1, 65_535, 65_535)
    seen, bad = set(), []
    for launch in launches(clients, n):
        seen.add(launch.kernel.fn.__name__.removesuffix("_kernel"))
        if any(axis > limit for axis, limit in zip(launch.grid, limits, strict=False)):
            bad.append((launch.kernel.fn.__name__, launch.grid))
    assert bad == []
    assert seen == {"down", "up", "fused", "outer", "gather", "scatter"}


def test_grid_counts_every_tile_and_knows_its_end():
    assert grid_of(3, 2, 5) == (30,)
    assert grid_of(2**31 - 1) == (2**31 - 1,)
    with pytest.raises(ValueError, match="1048576 clients with 2 x 1024 tiles"):
        grid_of(2**20, 2, 1024)


def test_tiles_of_one_client_are_neighbours():
    """Any order computes the same; this one keeps a client's factors in cache."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {
        "down_kernel", "up_kernel", "up_kernel, one row of tiles", "outer_kernel",
        "gather_kernel", "scatter_kernel",
    }  # fmt: skip
    for name, launched in found.items():
        # One tile alone would have no neighbour.
        assert max(share for share, _, _ in launched) > 1, name
        assert [(whole, others) for _, whole, others in launched] == [(True, False)] * len(launched)

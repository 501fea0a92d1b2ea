"""Measure block sizes and plans on the GPU at hand, and write them into the table.

    python -m h2tune_kernels.tune [--shape clients,n,D,F,r ...] [--table blocks.json] [--seconds 900]

Every kernel of a shape is timed alone over its candidates, forward and mirrored; then the plans are
timed whole with the winners. Rows name the device, so they never touch another device's choice.
Correctness is not checked here: a candidate computes the same sums in another order, and the tests
marked `gpu` cover the table's rows.
"""

import argparse
import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from h2tune_kernels import launch, triple_launch
from h2tune_kernels.blocks import Blocks, Table, rank_width, read_table
from h2tune_kernels.timing import device_time
from h2tune_kernels.triple_launch import Operands

__all__ = ["SHAPES", "candidates", "tune_shape", "write_table"]

# (clients, rows per client, D, F, r): the shapes of the benchmark.
SHAPES = tuple(
    (clients, n, d, f, r)
    for d, f in ((2048, 2048), (2048, 8192), (4096, 14336))
    for r in (8, 16, 64, 128)
    for clients, n in ((1, 4096), (8, 512), (64, 64), (8, 4096))
) + tuple((64, 1024, 384, 1536, r) for r in (8, 16))

# Inputs rotate until they are this much more than the cache holds.
_ROTATE_BYTES = 192 << 20


def candidates(kernel: str, r: int) -> Iterator[Blocks]:
    """Configurations worth timing for one kernel; those that cannot compile are skipped later."""
    width = rank_width(r)
    if kernel == "down":
        for rows in (16, 32, 64, 128):
            for step in (32, 64, 128, 256):
                if step * width <= 128 * 64 and rows * step <= 64 * 256:
                    for stages in (3, 4, 5):
                        yield Blocks(rows, 0, step, 8 if width >= 128 else 4, stages)
    elif kernel == "up":
        for rows in (32, 64, 128):
            for wide in (64, 128, 256):
                for warps in (4, 8):
                    if rows * wide <= 64 * 256 * (warps // 4):
                        yield Blocks(rows, wide, 0, warps, 1)
    elif kernel == "outer":
        for wide in (64, 128, 256):
            for step in (32, 64, 128):
                for stages in (3, 4):
                    if wide * width <= 128 * 128:
                        warps = 8 if wide * width >= 64 * 128 else 4
                        yield Blocks(0, wide, step, warps, stages, splits=0)
    elif kernel == "fused":
        for rows, wide, warps in ((64, 128, 4), (64, 256, 4), (64, 256, 8), (128, 128, 4),
                                  (128, 128, 8), (128, 256, 8)):  # fmt: skip
            for step, stages in ((32, 4), (64, 3), (64, 4)):
                yield Blocks(rows, wide, step, warps, stages)
    else:
        raise ValueError(f"no kernel called {kernel!r}")


def _sets(shape: tuple[int, int, int, int, int]) -> list[Any]:
    """Several sets of operands with cotangents, as many as outgrow the cache."""
    clients, n, d, f, r = shape
    count = max(2, math.ceil(_ROTATE_BYTES / (2 * clients * n * (d + f))))
    sets = []
    for i in range(min(count, 16)):
        keys = iter(jax.random.split(jax.random.key(i), 8))

        def draw(*dims: int, dtype: Any = jnp.bfloat16, keys: Any = keys) -> jax.Array:
            return jax.random.normal(next(keys), dims, jnp.float32).astype(dtype)

        o = Operands(
            x=draw(clients, n, d),
            w=draw(1, d, f),
            a=draw(clients, d, r, dtype=jnp.float32),
            core=draw(clients, r, r, dtype=jnp.float32),
            positions=None,
            b=draw(clients, r, f, dtype=jnp.float32),
            bias=None,
            scale=jnp.full((1,), 2.0, jnp.float32),
            ranks=None,
        )
        skinny = draw(clients, n, r)
        sets.append((o, skinny, skinny + skinny, draw(clients, n, f)))
    return sets


def _row(kernel: str, device: str, shape: tuple[int, ...], k: int, f: int) -> dict[str, Any]:
    clients, n, _, _, r = shape
    row = {"device": device, "kernel": kernel, "width": rank_width(r), "clients": clients, "n": n}
    return row | {"k": k, "f": f, "source": "measured"}


def tune_shape(
    shape: tuple[int, int, int, int, int], device: str, deadline: float
) -> list[dict[str, Any]]:
    """Rows for one shape: the best blocks of each kernel in each direction, then the plans."""
    clients, _, d, f, r = shape
    sets = _sets(shape)
    found: list[dict[str, Any]] = []

    def call(table: Table) -> Any:
        settings = (launch.cuda_launcher, clients, device, False, True, None)
        return triple_launch._Call(*settings, table)

    def down(table: Table, mirrored: bool, o: Operands, u: Any, z: Any, dy: Any) -> Any:
        x, matrix = (dy, o.b) if mirrored else (o.x, o.a)
        return triple_launch._down(call(table), o, x, matrix, mirrored)

    def up(table: Table, mirrored: bool, o: Operands, u: Any, z: Any, dy: Any) -> Any:
        return triple_launch._up(call(table), o, z, o.a if mirrored else o.b, mirrored)

    def fused(table: Table, mirrored: bool, o: Operands, u: Any, z: Any, dy: Any) -> Any:
        return triple_launch._fused(call(table), o, dy if mirrored else o.x, mirrored)

    def outer(table: Table, mirrored: bool, o: Operands, u: Any, z: Any, dy: Any) -> Any:
        wide, dtype = (dy, o.b.dtype) if mirrored else (o.x, o.a.dtype)
        return triple_launch._outer(call(table), o, wide, z, dtype, transposed=mirrored)

    steps = [
        ("down", down, False, d, 0),
        ("down", down, True, f, 0),
        ("up", up, False, 0, f),
        ("up", up, True, 0, d),
        ("outer", outer, False, 0, d),
        ("outer", outer, True, 0, f),
    ]
    if rank_width(r) <= 64:
        steps += [("fused", fused, False, d, f), ("fused", fused, True, f, d)]
    for kernel, fn, mirrored, k, wide in steps:
        row = _row(kernel, device, shape, k, wide)
        if any(all(old[key] == row[key] for key in row) for old in found):
            continue
        best: dict[str, Any] | None = None
        for blocks in candidates(kernel, r):
            if time.monotonic() > deadline:
                break
            trial = row | {"blocks": blocks._asdict()}
            try:
                timing = device_time(functools.partial(fn, (trial,), mirrored), sets, rounds=5)
            except Exception as reason:
                # Too much shared memory, or a shape the compiler refuses: not a candidate.
                print(f"  {kernel} {tuple(blocks)}: {type(reason).__name__}", file=sys.stderr)
                continue
            if best is None or timing.median < best["microseconds"]:
                best = trial | {"microseconds": round(timing.median, 2)}
        if best is not None:
            print(f"  {kernel} mirrored={mirrored}: {best['blocks']} {best['microseconds']} us")
            found.append(best)

    table = (*found, *read_table())
    settings = {"launcher": launch.cuda_launcher, "device": device, "residual": True}
    for mirrored, k, wide in ((False, d, f), (True, f, d)):
        best_plan, best_time = "", math.inf
        for plan in (
            ("around", "inplace", "fused") if rank_width(r) <= 64 else ("around", "inplace")
        ):
            if time.monotonic() > deadline:
                break

            def whole(
                o: Operands, u: Any, z: Any, dy: Any, plan: str = plan, back: bool = mirrored
            ) -> Any:
                if back:
                    return triple_launch.backward(o, u, z, dy, plan=plan, table=table, **settings)
                return triple_launch.forward(o, plan=plan, table=table, **settings)

            median = device_time(whole, sets, rounds=5).median
            print(f"  plan {plan} mirrored={mirrored}: {median:.1f} us")
            if median < best_time:
                best_plan, best_time = plan, median
        row = _row("plan", device, shape, k, wide) | {"microseconds": round(best_time, 2)}
        if best_plan and not any(old["kernel"] == "plan" and old["k"] == k and old["f"] == wide
                                 for old in found):  # fmt: skip
            found.append(row | {"plan": best_plan})
    return found


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        row.get(field) for field in ("device", "kernel", "width", "clients", "n", "k", "f")
    )


def write_table(path: pathlib.Path, measured: list[dict[str, Any]]) -> None:
    """Put measured rows in front of a table, in place of older rows for the same problem."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {_key(row) for row in measured}
    rows = [*measured, *(row for row in old if _key(row) not in new)]
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text('{\n"rows": [\n' + lines + "\n]\n}\n")


def main(argv: list[str] | None = None) -> int:
    """Tune the shapes asked for within the time allowed, writing after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", default=[], help="clients,n,D,F,r")
    parser.add_argument(
        "--table", type=pathlib.Path, default=pathlib.Path(__file__).with_name("blocks.json")
    )
    parser.add_argument("--seconds", type=float, default=900.0)
    options = parser.parse_args(argv)
    if jax.default_backend() != "gpu" or not launch.available():
        print("tuning needs a CUDA device, and jax_triton beside it", file=sys.stderr)
        return 1
    deadline = time.monotonic() + options.seconds
    shapes = [tuple(int(v) for v in text.split(",")) for text in options.shape] or SHAPES
    device = launch.target()[0]
    for shape in shapes:
        if time.monotonic() > deadline:
            print(f"out of time before {shape}", file=sys.stderr)
            break
        if len(shape) != 5:
            parser.error(f"a shape is clients,n,D,F,r, not {shape}")
        print(f"{device} {shape}")
        write_table(options.table, tune_shape(shape, device, deadline))
    return 0


if __name__ == "__main__":
    sys.exit(main())

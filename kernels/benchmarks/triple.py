"""Forward and backward of the triple product on a GPU, against what else one could run.

    python kernels/benchmarks/triple.py --out folder [--seconds 300]

For every shape: (ours) triple_matmul; (a) the einsum form under jit; (b) plain x W and its dx, the
floor of any adapter; (c) the same in torch as three products, where torch sees a GPU. Times are per
forward and backward together, gradients to x, A, T and B. Bytes and operations are counted by hand
below, and the shares are against the two ceilings measured at the start: a device-to-device copy and
a large matrix product. Writes triple.csv and summary.txt, and prints the summary.
"""

import argparse
import csv
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from h2tune_kernels import triple_matmul
from h2tune_kernels.timing import Timing, device_time

ROTATE_BYTES = 192 << 20


class Shape(NamedTuple):
    clients: int
    n: int
    d: int
    f: int
    r: int
    ragged: bool = False

    @property
    def tokens(self) -> int:
        return self.clients * self.n


def shapes() -> list[Shape]:
    """The rows of the table, the ones that decide a target first."""
    sizes = ((2048, 2048), (2048, 8192), (4096, 14336))
    rows = [Shape(64, 1024, 384, 1536, 8), Shape(64, 1024, 1536, 384, 8)]
    for clients, n in ((64, 64), (1, 4096), (8, 512), (8, 4096)):
        rows += [Shape(clients, n, d, f, r) for r in (16, 64, 8, 128) for d, f in sizes]
    # Ranks 4 and 64 by turns in one launch: to be read beside the row of rank 64.
    return [*rows, Shape(64, 64, 2048, 2048, 64, ragged=True)]


def operations(s: Shape) -> tuple[float, float]:
    """(base, adapter) floating-point operations of a forward and backward, no dW."""
    base = 2 * 2 * s.tokens * s.d * s.f
    # forward u, z, y; backward g, du, dx, dA, dT, dB
    adapter = 2 * s.tokens * (2 * s.d * s.r + 2 * s.f * s.r + s.r * s.r)
    adapter += 2 * s.tokens * (s.d * s.r + s.f * s.r + 2 * s.r * s.r)
    return float(base), float(adapter)


def bytes_least(s: Shape) -> tuple[float, float]:
    """(base, with adapter): bytes that any program must move, each array once per direction."""
    rows, two = s.tokens, 2
    base = two * (rows * s.d + s.d * s.f + rows * s.f) * 2
    masters = 4 * s.clients * s.r * (s.d + s.f)
    # A and B are read in both directions, their gradients are written once; x and dy are read again
    # for dA and dB, which need the finished u-sized products of the other direction.
    adapter = 3 * masters + two * (rows * s.d + rows * s.f) + two * 8 * rows * s.r
    return float(base), float(base + adapter)


def draw(s: Shape, seed: int) -> tuple[Any, ...]:
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*dims: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jax.random.normal(next(keys), dims, jnp.float32).astype(dtype)

    x, w, dy = normal(s.clients, s.n, s.d), normal(s.d, s.f), normal(s.clients, s.n, s.f)
    a = normal(s.clients, s.d, s.r, dtype=jnp.float32) * (s.d**-0.5)
    core = normal(s.clients, s.r, s.r, dtype=jnp.float32) * (s.r**-0.5)
    b = normal(s.clients, s.r, s.f, dtype=jnp.float32)
    return x, w * jnp.bfloat16(s.d**-0.5), a, core, b, dy


def with_gradients(product: Callable[..., jax.Array], trained: int) -> Callable[..., Any]:
    """y and the cotangents of x and, if trained, of A, T and B. W is frozen."""

    def run(x: Any, w: Any, a: Any, core: Any, b: Any, dy: Any) -> Any:
        if not trained:
            y, pull = jax.vjp(lambda x: product(x, w, a, core, b), x)
        else:
            y, pull = jax.vjp(lambda x, a, core, b: product(x, w, a, core, b), x, a, core, b)
        return y, pull(dy)

    return run


def ours(s: Shape) -> Callable[..., Any]:
    ranks = jnp.where(jnp.arange(s.clients) % 2 == 0, 4, 64).astype(jnp.int32)

    def product(x: Any, w: Any, a: Any, core: Any, b: Any) -> Any:
        def one(x: Any, a: Any, core: Any, b: Any, rank: Any) -> Any:
            rank = rank if s.ragged else None
            return triple_matmul(x, w, a, core, b, scale=2.0, ranks=rank, kernels="triton")

        return jax.vmap(one)(x, a, core, b, ranks)

    return with_gradients(product, True)


def einsum_form(x: Any, w: Any, a: Any, core: Any, b: Any) -> Any:
    a, core, b = (v.astype(x.dtype) for v in (a, core, b))
    u = jnp.einsum("cnd,cdr->cnr", x, a)
    z = u + jnp.einsum("cnr,crq->cnq", u, core)
    return jnp.einsum("cnd,df->cnf", x, w) + 2.0 * jnp.einsum("cnr,crf->cnf", z, b)


def base_form(x: Any, w: Any, a: Any, core: Any, b: Any) -> Any:
    return jnp.einsum("cnd,df->cnf", x, w)


def torch_time(s: Shape) -> Timing | None:
    """(c): three products in torch, timed by events round a captured queue."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None

    def normal(*dims: int) -> Any:
        return torch.randn(dims, device="cuda", dtype=torch.bfloat16)

    sets = []
    for _ in range(rotations(s)):
        x = normal(s.clients, s.n, s.d).requires_grad_()
        parts = (normal(s.clients, s.d, s.r), normal(s.clients, s.r, s.r),
                 normal(s.clients, s.r, s.f))  # fmt: skip
        sets.append((x, *(p.requires_grad_() for p in parts), normal(s.clients, s.n, s.f)))
    w = normal(s.d, s.f)

    def step(x: Any, a: Any, core: Any, b: Any, dy: Any) -> None:
        u = x @ a
        y = x @ w + 2.0 * ((u + u @ core) @ b)
        torch.autograd.grad(y, (x, a, core, b), dy)

    times = []
    for round_ in range(6):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for args in sets:
            step(*args)
        stop.record()
        torch.cuda.synchronize()
        if round_:
            times.append(1e3 * start.elapsed_time(stop) / len(sets))
    del sets
    torch.cuda.empty_cache()
    return Timing(statistics.median(times), min(times), max(times))


def rotations(s: Shape) -> int:
    return min(12, max(2, math.ceil(ROTATE_BYTES / (2 * s.tokens * (s.d + s.f)))))


def ceilings() -> tuple[float, float]:
    """(bytes per second of a copy, operations per second of a large product), on random data."""
    big = [(jax.random.normal(jax.random.key(i), (1 << 28,), jnp.bfloat16),) for i in range(2)]
    copy = device_time(lambda v: v + jnp.bfloat16(1), big)
    side = 8192
    square = [
        tuple(jax.random.normal(jax.random.key(10 * i + j), (side, side), jnp.bfloat16)
              for j in range(2))
        for i in range(2)
    ]  # fmt: skip
    product = device_time(lambda a, b: a @ b, square)
    return 4.0 * (1 << 28) / copy.median * 1e6, 2.0 * side**3 / product.median * 1e6


def geometric(values: list[float]) -> float:
    return (
        math.exp(statistics.fmean(math.log(max(v, 1e-9)) for v in values)) if values else math.nan
    )


def summary(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [json.dumps(facts), ""]
    head = f"{'clients':>7} {'n':>5} {'D':>5} {'F':>6} {'r':>4} {'ours':>9} {'einsum':>9} {'xW':>9}"
    lines.append(head + f" {'torch':>9} {'ours/a':>7} {'cost ours':>10} {'cost a':>8}")
    for row in rows:
        torch = row["torch_us"]
        lines.append(
            f"{row['clients']:7} {row['n']:5} {row['d']:5} {row['f']:6} {row['r']:4}"
            f" {row['ours_us']:9.1f} {row['einsum_us']:9.1f} {row['base_us']:9.1f}"
            f" {torch if torch == '' else format(torch, '.1f'):>9} {row['ours_over_einsum']:7.3f}"
            f" {100 * row['ours_cost']:9.1f}% {100 * row['einsum_cost']:7.1f}%"
            + ("  ragged ranks 4 and 64" if row["ragged"] else "")
        )
    plain = [row for row in rows if not row["ragged"]]
    gains = [row["ours_cost"] / row["einsum_cost"] for row in plain if row["einsum_cost"] > 0]
    slower = [row for row in plain if row["ours_over_einsum"] > 1.0]
    small = [row for row in plain if row["r"] <= 16 and row["clients"] == 64 and row["d"] >= 2048]
    worst = max((row["ours_cost"] for row in small), default=math.nan)

    def verdict(good: bool) -> str:
        return "met" if good else "NOT met"

    lines += [
        "",
        f"cost over x W, ours to einsum, geometric mean: {geometric(gains):.3f} over "
        f"{len(gains)} rows (target: at most 0.5): {verdict(geometric(gains) <= 0.5)}",
        f"rows slower than einsum: {len(slower)} (target: none): {verdict(not slower)}",
        f"largest cost over x W for r <= 16 at 64 clients: {100 * worst:.1f}% over {len(small)} "
        f"rows (target: at most 15%): {verdict(worst <= 0.15)}",
    ]
    return "\n".join(lines) + "\n"


def measure(s: Shape, base: Timing, ceiling: tuple[float, float]) -> dict[str, Any]:
    sets = [draw(s, seed) for seed in range(rotations(s))]
    own = device_time(ours(s), sets)
    einsum = device_time(with_gradients(einsum_form, True), sets)
    del sets
    torch = torch_time(s)
    base_ops, adapter_ops = operations(s)
    base_bytes, all_bytes = bytes_least(s)
    floor = 1e6 * max((base_ops + adapter_ops) / ceiling[1], all_bytes / ceiling[0])
    return {
        **s._asdict(),
        "ours_us": own.median, "ours_low": own.low, "ours_high": own.high,
        "einsum_us": einsum.median, "einsum_low": einsum.low, "einsum_high": einsum.high,
        "base_us": base.median, "base_low": base.low, "base_high": base.high,
        "torch_us": "" if torch is None else torch.median,
        "ours_over_einsum": own.median / einsum.median,
        "ours_cost": own.median / base.median - 1,
        "einsum_cost": einsum.median / base.median - 1,
        "base_operations": base_ops, "adapter_operations": adapter_ops,
        "base_bytes": base_bytes, "least_bytes": all_bytes,
        "floor_us": floor, "share_of_ceiling": floor / own.median,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        print("the benchmark needs a CUDA device", file=sys.stderr)
        return 1
    deadline = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    ceiling = ceilings()
    facts = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_bytes_per_second": ceiling[0],
        "product_operations_per_second": ceiling[1],
        "unit": "microseconds for one forward and backward, median",
    }
    rows: list[dict[str, Any]] = []
    bases: dict[tuple[int, int, int, int], Timing] = {}
    left_out: list[str] = []
    for s in shapes():
        if time.monotonic() > deadline:
            left_out.append(str(tuple(s)))
            continue
        key = (s.clients, s.n, s.d, s.f)
        if key not in bases:
            sets = [draw(s, seed) for seed in range(rotations(s))]
            bases[key] = device_time(with_gradients(base_form, False), sets)
            del sets
        rows.append(measure(s, bases[key], ceiling))
        with (options.out / "triple.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        text = summary(rows, facts)
        if left_out:
            text += f"left out for lack of time: {', '.join(left_out)}\n"
        (options.out / "summary.txt").write_text(text)
    text = summary(rows, facts)
    if left_out:
        text += f"left out for lack of time: {len(left_out)} rows: {', '.join(left_out)}\n"
    (options.out / "summary.txt").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

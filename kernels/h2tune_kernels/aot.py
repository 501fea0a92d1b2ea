"""Compiling kernels without a GPU, and reading what the compiler says of them.

    python -m h2tune_kernels.aot [--capability 90]

prints registers, spills, shared memory and matrix instructions of every kernel in the block table.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from h2tune_kernels import triple_launch
from h2tune_kernels.blocks import PLANS, read_table
from h2tune_kernels.core import gather_launch, scatter_launch
from h2tune_kernels.launch import Launch
from h2tune_kernels.triple_launch import Operands

__all__ = ["SHARED_LIMIT", "Resources", "Variant", "compile_variant", "core_variants", "variants"]

# Bytes of shared memory one program may hold, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}

_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32"}


class Variant(NamedTuple):
    """A launch with the dtypes of its operands: all that decides the machine code."""

    launch: Launch
    dtypes: tuple[str, ...]

    def label(self) -> str:
        """Kernel and configuration, short."""
        c, b = self.launch.constants, self.launch.blocks
        flags = [f for f in ("TRANSPOSE", "SPARSE", "RAGGED", "ADD", "SUM") if c.get(f)]
        return (
            f"{self.launch.kernel.fn.__name__} width {c.get('WIDE', '-')} "
            f"{b.rows}x{b.wide}x{b.step} warps {b.num_warps} stages {b.num_stages} "
            f"{self.dtypes[0]} {' '.join(flags).lower()}"
        ).strip()


class Resources(NamedTuple):
    """What one compiled kernel uses."""

    registers: int
    spilled: int  # bytes of stores and loads to local memory
    stack: int
    shared: int
    wgmma: bool  # the matrix instructions of a whole warp group, Hopper's
    mma: bool  # the matrix instructions of one warp


@dataclasses.dataclass
class _Recorder:
    """A launcher that runs nothing and remembers what it was asked."""

    variants: list[Variant] = dataclasses.field(default_factory=list)

    def __call__(self, launch: Launch, *operands: jax.Array) -> tuple[jax.Array, ...]:
        arrays = (*operands, *launch.out_shapes)
        self.variants.append(Variant(launch, tuple(str(a.dtype) for a in arrays)))
        return tuple(jnp.zeros(s.shape, s.dtype) for s in launch.out_shapes)


def variants(
    *,
    device: str,
    clients: int,
    n: int,
    d: int,
    f: int,
    r: int,
    dtype: Any = jnp.bfloat16,
    size: int | None = None,
    ragged: bool = False,
    bias: bool = True,
    plan: str | None = None,
) -> list[Variant]:
    """Every launch of one forward and backward. `size` takes the core from a middle matrix."""
    spec = jax.ShapeDtypeStruct
    core = r if size is None else size
    o = Operands(
        x=spec((clients, n, d), dtype),  # pyright: ignore
        w=spec((1, d, f), dtype),  # pyright: ignore
        a=spec((clients, d, r), jnp.float32),  # pyright: ignore
        core=spec((clients, core, core), jnp.float32),  # pyright: ignore
        positions=None if size is None else spec((clients, r * r), jnp.int32),  # pyright: ignore
        b=spec((clients, r, f), jnp.float32),  # pyright: ignore
        bias=spec((1, f), dtype) if bias else None,  # pyright: ignore
        scale=spec((1,), jnp.float32),  # pyright: ignore
        ranks=spec((clients,), jnp.int32) if ragged else None,  # pyright: ignore
    )
    recorder = _Recorder()
    settings: dict[str, Any] = {
        "launcher": recorder,
        "device": device,
        "residual": True,
        "plan": plan,
    }

    def both(o: Operands) -> Any:
        y, u, z = triple_launch.forward(o, **settings)
        return triple_launch.backward(o, u, z, y, **settings)

    jax.eval_shape(both, o)
    return recorder.variants


def core_variants() -> list[Variant]:
    """The launches of `sparse_core` and `scatter_core`."""
    recorder = _Recorder()

    def both(middle: jax.Array, index: jax.Array) -> jax.Array:
        return scatter_launch(recorder, gather_launch(recorder, middle, index), index, 128)

    spec = jax.ShapeDtypeStruct
    jax.eval_shape(both, spec((2, 128 * 128), jnp.float32), spec((2, 256), jnp.int32))
    return recorder.variants


def compile_variant(variant: Variant, capability: int) -> Resources:
    """Compile for a compute capability, as jax_triton will, and read the resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch, names = variant.launch, variant.launch.kernel.arg_names
    pointers = {name: f"*{_NAMES[d]}" for name, d in zip(names, variant.dtypes, strict=False)}
    constants = {name: launch.constants[name] for name in names if name in launch.constants}
    signature = {name: pointers.get(name, "constexpr") for name in names}
    source = ASTSource(
        launch.kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    kernel = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.blocks.num_warps, "num_stages": launch.blocks.num_stages},
    )
    ptx = str(kernel.asm["ptx"])
    usage = _resource_usage(bytes(kernel.asm["cubin"]))
    return Resources(
        registers=usage["REG"],
        spilled=usage["LOCAL"],
        stack=usage["STACK"],
        shared=int(kernel.metadata.shared),
        wgmma="wgmma.mma_async" in ptx,
        mma="mma.sync" in ptx,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a binary, from the cubin tool that Triton ships."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    fields = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", out.stdout + out.stderr)
    return {name: int(value) for name, value in fields}


def table_variants(device: str) -> Iterator[Variant]:
    """One variant of every kernel, configuration and flag that the rows of a device can reach."""
    seen: set[str] = set()
    for shape in _shapes(device):
        for extra in ({}, {"size": 128, "ragged": shape["plan"] != "fused"}):
            for variant in variants(device=device, **shape, **extra):
                if variant.label() not in seen:
                    seen.add(variant.label())
                    yield variant
    yield from core_variants()


def _shapes(device: str) -> Iterator[dict[str, Any]]:
    """Shapes that reach every row of the table for a device, and the defaults."""
    for r in (16, 64, 128):
        shape = {"clients": 2, "n": 512, "d": 512, "f": 512, "r": r}
        if r in (16, 128):
            yield {**shape, "dtype": jnp.float32, "plan": "around"}
        for plan in PLANS if r <= 64 else ("around", "inplace"):
            yield {**shape, "plan": plan}
    for row in read_table():
        if row["device"] == device and "blocks" in row:
            yield {
                "clients": row.get("clients", 4),
                "n": row.get("n", row.get("min_n", min(row.get("max_n", 1024), 1024))),
                "d": row.get("k") or 2048,
                "f": row.get("f") or 2048,
                "r": row.get("r", row["width"]),
                "plan": "fused" if row["kernel"] == "fused" else "around",
            }


def main() -> None:
    """Print the resources of every kernel in the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90, choices=sorted(SHARED_LIMIT))
    capability = parser.parse_args().capability
    for variant in table_variants(f"sm_{capability}"):
        print(f"{variant.label():90} {compile_variant(variant, capability)}", flush=True)


if __name__ == "__main__":
    main()

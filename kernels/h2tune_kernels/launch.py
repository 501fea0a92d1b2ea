"""The one file that knows jax_triton: how a kernel launch becomes a JAX operation.

jax_triton imports only beside a CUDA plugin of JAX, and Triton takes seconds to import, so neither
is imported before the first launch is traced.
"""

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from h2tune_kernels.blocks import Blocks

__all__ = [
    "Launch",
    "Launcher",
    "available",
    "cuda_launcher",
    "grid_of",
    "interpreted",
    "target",
]

# Kernel binaries for compute capability 9.0 use instructions of that generation alone; PTX for 8.0
# runs on everything newer. So 8.0 is the target where no device is at hand to ask.
DEFAULT_TARGET = ("sm_80", 80)

# What CUDA takes on the first axis of a grid. On the other two it takes 65,535.
MAX_PROGRAMS = (1 << 31) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch: which kernel, over what grid, with which compile-time constants."""

    kernel: Any
    grid: tuple[int, ...]
    out_shapes: tuple[jax.ShapeDtypeStruct, ...]
    constants: Mapping[str, Any]
    blocks: Blocks
    # Input position -> output position that takes over its buffer.
    aliases: Mapping[int, int] = dataclasses.field(default_factory=dict)


# (launch, operands) -> outputs
Launcher = Callable[..., tuple[jax.Array, ...]]


def grid_of(clients: int, *tiles: int) -> tuple[int]:
    """The grid of `clients` times their tiles, all on the first axis.

    Clients are the product of all vmapped axes, and the row blocks of one client have no bound
    either: both can pass the 65,535 of the other axes. 2^31 - 1 programs of at least 16 rows are 34
    billion rows. The client runs slowest and the last of `tiles` fastest, so that programs of one
    client are neighbours and find its factors in the cache. `this_client` and `this_tile` take the
    two apart again; `fused_kernel` has an order of its own.
    """
    programs = clients * math.prod(tiles)
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"{clients} clients with {' x '.join(map(str, tiles))} tiles each are {programs} "
            f"programs, and one launch takes {MAX_PROGRAMS}: give it fewer clients or rows"
        )
    return (programs,)


def interpreted() -> bool:
    """Whether Triton is set to run kernels in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def available() -> bool:
    """Whether jax_triton can be imported: it, Triton, and a CUDA plugin of JAX are installed."""
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return (
        importlib.util.find_spec("triton") is not None
        and importlib.util.find_spec("jax_triton") is not None
        and any(importlib.util.find_spec(plugin) is not None for plugin in plugins)
    )


def target() -> tuple[str, int]:
    """(name of the device in the block table, compute capability) that kernels are built for.

    The first CUDA device if there is one; otherwise H2TUNE_KERNELS_TARGET (such as `sm_90`), for
    lowering on a machine without a GPU; otherwise sm_80.
    """
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        name = os.environ.get("H2TUNE_KERNELS_TARGET")
        if name is None:
            return DEFAULT_TARGET
        if not name.startswith("sm_") or not name[3:].isdigit():
            raise ValueError(
                f"H2TUNE_KERNELS_TARGET is a name such as sm_90, not {name!r}"
            ) from None
        return name, int(name[3:])
    return device.device_kind, int(str(device.compute_capability).replace(".", ""))


def cuda_launcher(launch: Launch, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """Bind a launch as an operation that lowers on CUDA."""
    import jax_triton  # pyright: ignore[reportMissingImports]

    out = jax_triton.triton_call(
        *operands,
        kernel=launch.kernel,
        out_shape=list(launch.out_shapes),
        grid=launch.grid,
        name=launch.kernel.fn.__name__,
        num_warps=launch.blocks.num_warps,
        num_stages=launch.blocks.num_stages,
        compute_capability=target()[1],
        input_output_aliases=dict(launch.aliases),
        **launch.constants,
    )
    return tuple(out)

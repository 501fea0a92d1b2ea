"""Block sizes by shape and device: a table, and a default for what the table does not have."""

import functools
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = [
    "PLANS",
    "Blocks",
    "Problem",
    "Table",
    "blocks_for",
    "plan_for",
    "rank_width",
    "read_table",
]

PLANS = ("fused", "around", "inplace")


class Blocks(NamedTuple):
    """How one launch is cut up. `wide` runs along D or F, `step` along the summed axis."""

    rows: int  # rows of x or y a program holds (down, up, fused)
    wide: int  # columns of y a program holds (up, fused), of x or dy (outer)
    step: int  # length of one step along the summed axis (down, fused; rows in outer)
    num_warps: int
    num_stages: int
    splits: int = 1  # parts into which outer cuts the rows, each summed on its own


class Problem(NamedTuple):
    """What a choice of blocks may depend on."""

    device: str  # device kind, or sm_NN
    clients: int
    n: int  # rows per client
    k: int  # the summed wide axis (down, fused); 0 where there is none
    f: int  # the written wide axis (up, outer, fused); 0 where there is none
    r: int
    itemsize: int  # of x


Table = tuple[Mapping[str, Any], ...]


def rank_width(r: int) -> int:
    """The tile width that holds r: a power of two, at least 16 (the narrowest matrix unit)."""
    return max(16, 1 << (r - 1).bit_length())


@functools.cache
def read_table() -> Table:
    """The rows of blocks.json: first match wins."""
    text = importlib.resources.files("h2tune_kernels").joinpath("blocks.json").read_text()
    return tuple(json.loads(text)["rows"])


def _generation(device: str) -> str:
    """The compute capability that stands for a device without rows of its own."""
    if device.startswith("sm_"):
        return device
    names = {"H100": "sm_90", "H200": "sm_90", "GH200": "sm_90", "A100": "sm_80", "A30": "sm_80"}
    return next((sm for name, sm in names.items() if name in device), "")


def _matches(row: Mapping[str, Any], kernel: str, p: Problem) -> bool:
    if row["kernel"] != kernel or row.get("itemsize", 2) != p.itemsize:
        return False
    if row["device"] not in (p.device, _generation(p.device)):
        return False
    if row.get("width", rank_width(p.r)) != rank_width(p.r):
        return False
    exact = ("clients", "n", "k", "f", "r")
    if any(row[field] != getattr(p, field) for field in exact if field in row):
        return False
    return row.get("min_n", 0) <= p.n <= row.get("max_n", p.n)


def blocks_for(kernel: str, p: Problem, table: Table | None = None) -> Blocks:
    """Blocks of `down`, `up`, `fused` or `outer`: the table's first match, or the safe default."""
    for row in read_table() if table is None else table:
        if "blocks" in row and _matches(row, kernel, p):
            blocks = Blocks(**row["blocks"])
            break
    else:
        blocks = _default(kernel, p)
    if kernel == "outer" and blocks.splits == 0:
        blocks = blocks._replace(splits=_splits(p, blocks))
    return blocks


def _splits(p: Problem, blocks: Blocks) -> int:
    """Parts of the rows such that about 256 programs run; fewer parts mean fewer bytes to sum."""
    programs = p.clients * -(-p.f // blocks.wide)
    steps = -(-p.n // blocks.step)
    return max(1, min(-(-256 // programs), steps // 2))


def _default(kernel: str, p: Problem) -> Blocks:
    """Small enough for the shared memory of every card since 8.0 (99 KiB), whatever the shape."""
    width = rank_width(p.r)
    narrow = p.itemsize > 2
    if kernel == "down":
        rows = 16 if p.clients * -(-p.n // 32) < 128 else 32
        step = 32 if width >= 128 or narrow else 64
        # The gathered core is a [width, width] tile in registers: eight warps hold 128 x 128.
        return Blocks(rows, 0, step, num_warps=8 if width >= 128 else 4, num_stages=3)
    if kernel == "up":
        wide = 64 if width >= 128 or narrow else 128
        rows = 32 if narrow else 64
        return Blocks(rows, wide, 0, num_warps=8 if width >= 128 else 4, num_stages=1)
    if kernel == "outer":
        if narrow:
            return Blocks(0, 32, 32, num_warps=4, num_stages=3, splits=0)
        return Blocks(0, 64, 64, num_warps=8 if width >= 128 else 4, num_stages=3, splits=0)
    if kernel == "fused":
        return Blocks(64, 128, 32, num_warps=8 if width >= 64 else 4, num_stages=3)
    raise ValueError(f"no kernel called {kernel!r}")


def plan_for(p: Problem, *, ragged: bool, shared_x: bool, table: Table | None = None) -> str:
    """Which of PLANS a product of this shape takes (docs/kernels.md counts the bytes).

    `fused` needs 16-bit operands and one rank for all; `inplace` needs a y of each client's own.
    """
    can_fuse = p.itemsize == 2 and not ragged and rank_width(p.r) <= 64
    for row in read_table() if table is None else table:
        if "plan" in row and _matches(row, "plan", p):
            plan = row["plan"]
            if (plan == "fused" and not can_fuse) or (plan == "inplace" and shared_x):
                continue
            return plan
    # Writing and rereading y costs 4 bytes an element, x W costs 2 k operations an element: below
    # some k the extra pass weighs more than what a kernel of ours loses to the vendor's product.
    return "fused" if can_fuse and p.k <= 1024 and rank_width(p.r) <= 32 else "around"

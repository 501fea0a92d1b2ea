"""The throughput targets, against the newest rows of `results/`: printed whether met or missed.

python experiments/throughput/targets.py       # exit code 1 where one is missed or not measured
"""

import sys
from pathlib import Path
from typing import NamedTuple

import compare
import flat

from h2tune_jax.bench import rows, table

MACHINE = Path(__file__).parent / "results" / "machine.csv"


class Target(NamedTuple):
    """One target: what is compared, the bound, and what was measured (None: nothing yet)."""

    what: str
    bound: float
    at_least: bool
    measured: float | None

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured yet"
        met = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        return "met" if met else "missed"

    def cells(self) -> list[str]:
        sign = ">=" if self.at_least else "<="
        measured = "-" if self.measured is None else table.number(self.measured)
        return [self.what, f"{sign} {self.bound:g}", measured, self.verdict]


HEADS = ("target", "bound", "measured", "")


def newest_peers() -> list[dict]:
    """Rows of `peers.csv`, the newest of each program and number of threads."""
    found = rows.read(compare.RESULTS, whole=compare.WHOLE, numbers=compare.NUMBERS)
    return rows.newest(found, ("stage", "program", "threads", "clients", "steps", "device"))


def newest_flat() -> list[dict]:
    """Rows of `flat.csv`, the newest of each size."""
    found = rows.read(flat.RESULTS, whole=flat.WHOLE, numbers=flat.NUMBERS)
    return rows.newest(found, ("population", "participants", "device"))


def newest_machine() -> list[dict]:
    """Rows of `machine.csv` (`h2tune bench`), the newest of each case."""
    return rows.newest(rows.read(MACHINE), (*rows.CASE_COLUMNS, "device"))


def best(found: list[dict], stage: str, program: str, *, gpu: bool = False) -> dict | None:
    """Return the better of a program's rows: its best number of threads."""
    own = [
        row
        for row in found
        if row["stage"] == stage and row["program"] == program and is_gpu(row) == gpu
    ]
    return max(own, key=lambda row: row["clients_per_second"], default=None)


def is_gpu(row: dict) -> bool:
    """Tell rows of a CUDA device by its name."""
    return "NVIDIA" in row["device"]


def times_of(found: list[dict], stage: str, peer: str, *, gpu: bool = False) -> float | None:
    """How many times the peer's clients a second we run."""
    ours, theirs = best(found, stage, "h2tune_jax", gpu=gpu), best(found, stage, peer, gpu=gpu)
    if ours is None or theirs is None:
        return None
    return ours["clients_per_second"] / theirs["clients_per_second"]


def flatness(found: list[dict]) -> float | None:
    """Dearest over cheapest client, where everyone takes part; None unless 16 and 10,000 are there."""
    own = [row for row in found if row["kind"] == "everyone" and not is_gpu(row)]
    if not {16, 10_000} <= {row["participants"] for row in own}:
        return None
    costs = [row["seconds_per_client"] for row in own]
    return max(costs) / min(costs)


def targets() -> list[Target]:
    """All of them, in the order in which they were set."""
    peers = newest_peers()
    result = []
    for clients, bounds in ((20, (1.5, 2.5, 15.0)), (100, (1.2, 2.0, 8.0))):
        for peer, bound in zip(("fedjax", "pfl", "Flower"), bounds):
            what = f"MLP, {clients} clients a round: clients/s over {peer}"
            result.append(Target(what, bound, True, times_of(peers, f"mlp{clients}", peer)))
        pair = best(peers, f"pair{clients}", "h2tune_jax")
        what = f"MLP, {clients} clients a round: time over the better bare JAX loop"
        result.append(Target(what, 1.05, False, None if pair is None else pair["ratio"]))
    for steps in (1, 4):
        for peer, bound in (("torch + peft", 1.2), ("process per client", 20.0)):
            what = f"MiniLM LoRA, {steps} step{'s' * (steps > 1)} a client: clients/s over {peer}"
            result.append(Target(what, bound, True, times_of(peers, f"lora{steps}", peer)))
    what = "MLP: dearest over cheapest client from 16 to 10,000 clients"
    result.append(Target(what, 1.10, False, flatness(newest_flat())))
    what = "GPU, 64 MiniLM clients: clients/s over torch + peft"
    result.append(Target(what, 10.0, True, times_of(peers, "lora4", "torch + peft", gpu=True)))
    shares = [
        row["share_of_peak"]
        for row in newest_machine()
        if row["platform"] == "gpu" and row["model"] == "llama-3.2-1b" and not row["skipped"]
    ]
    what = "GPU, Llama-3.2-1B-shaped cohort: share of the measured bf16 peak"
    return [*result, Target(what, 0.45, True, max(shares, default=None))]


def main() -> int:
    found = targets()
    print(table.plain(HEADS, [target.cells() for target in found]))
    return 0 if all(target.verdict == "met" for target in found) else 1


if __name__ == "__main__":
    sys.exit(main())

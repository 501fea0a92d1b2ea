"""Measure h2tune_jax beside its peers, in one run, on the same work.

    python experiments/throughput/compare.py [--stages mlp20,mlp100,lora] [--repeats 5]
    python experiments/throughput/compare.py --smoke          # every program once, a few rounds
    python experiments/throughput/compare.py --gpu            # on a CUDA machine; see README.md

Short processes take turns, A B C A B C ..., so that a drift of the machine meets all of them; a figure is
the median over all rounds of all of a program's processes, with quartiles. Every program runs with one
and with two threads (cores), and is judged by its better. Programs whose check differs from the others'
did other work: the run says so and ends with code 1. Rows are appended to `results/peers.csv`.
"""

import argparse
import collections
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from h2tune_jax.bench import machine, rows

HERE = Path(__file__).parent
PEERS = HERE / "peers"
RESULTS = HERE / "results" / "peers.csv"
COLUMNS = (
    "time", "stage", "program", "version", "threads", "clients", "steps", "rounds", "processes",
    "seconds", "seconds_low", "seconds_high", "clients_per_second", "tokens_per_second",
    "check", "ratio", "ratio_low", "ratio_high", "device", "cores", "python", "jax",
)  # fmt: skip
WHOLE = frozenset(("threads", "clients", "steps", "rounds", "processes", "cores"))
NUMBERS = frozenset((
    "seconds", "seconds_low", "seconds_high", "clients_per_second", "tokens_per_second", "check",
    "ratio", "ratio_low", "ratio_high",
))  # fmt: skip
AGREE = 1e-5  # relative difference of two programs' checks


class Program(NamedTuple):
    """A script of `peers/`, the environment that it runs in, and how it is called."""

    script: str
    venv: str | None  # None: this project's own
    package: str | None  # whose version stands in the row; None: h2tune_jax or jax
    threads: tuple[int, ...] = (2, 1)
    flags: tuple[str, ...] = ()


class Stage(NamedTuple):
    """Programs that do the same work."""

    programs: tuple[Program, ...]
    clients: int
    rounds: int
    few: int  # rounds of programs that take seconds each
    steps: int = 5


OURS = "h2tune_jax"
PAIR = Program("pair_mlp.py", None, None)
FLOWER = Program("flower_mlp.py", "flower", "flwr", (2,))
MLP = (
    Program("h2tune_mlp.py", None, None),
    Program("h2tune_mlp.py", None, None, (2,), ("--devices", "2")),
    Program("bare_jax_mlp.py", None, None, flags=("--axis", "scan")),
    Program("bare_jax_mlp.py", None, None, flags=("--axis", "vmap")),
    Program("drjax_mlp.py", "drjax", "drjax"),
    Program("fedjax_mlp.py", "fedjax", "fedjax"),
    Program("pfl_mlp.py", "pfl", "pfl"),
    Program("torch_mlp.py", "torch", "torch"),
    FLOWER,
)
PROCESS = Program("process_lora.py", "torch", "peft", (2,))
LORA = (
    Program("h2tune_lora.py", None, None),
    Program("h2tune_lora.py", None, None, (2,), ("--devices", "2")),
    Program("torch_lora.py", "torch", "peft"),
    PROCESS,
)
STAGES = {
    "mlp20": Stage(MLP, 20, 40, 6),
    "mlp100": Stage(MLP, 100, 15, 6),
    "pair20": Stage((PAIR,), 20, 40, 0),
    "pair100": Stage((PAIR,), 100, 20, 0),
    "lora1": Stage(LORA, 16, 4, 1, steps=1),
    "lora4": Stage(LORA, 16, 2, 1, steps=4),
}
GPU_STAGES = {"lora4": Stage((LORA[0], LORA[2]), 64, 10, 0, steps=4)}
SLOW_CLIENTS = 4  # a round's processes follow each other: four of sixteen measure the same


def command_of(program: Program, stage: Stage, threads: int, smoke: bool, pythons: dict) -> list:
    """Give the command line of one process."""
    python = sys.executable
    if program.venv is not None:
        python = pythons.get(program.venv, PEERS / ".venvs" / program.venv / "bin" / "python")
    slow = program in (FLOWER, PROCESS)
    lora = "lora" in program.script
    clients = (2 if lora else stage.clients) if smoke else stage.clients
    if program is PROCESS and not smoke:
        clients = SLOW_CLIENTS
    rounds = (1 if slow else 3) if smoke else (stage.few if slow else stage.rounds)
    command = [str(python), str(PEERS / program.script), "--threads", str(threads)]
    command += ["--clients", str(clients), "--rounds", str(rounds), *program.flags]
    if lora:
        command += ["--steps", str(stage.steps)]
    if program is PROCESS:
        command += ["--total", str(clients if smoke else stage.clients)]
    return command


def run(command: list[str]) -> list[dict]:
    """Run one process: -> what it reports; nothing after a failure, which is printed."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=PEERS)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        said = (done.stderr.strip() or "no message").splitlines()[-1]
        print(f"  FAILED ({done.returncode}): {' '.join(command[1:])}: {said}", flush=True)
        return []
    return [json.loads(line.removeprefix("RESULT ")) for line in found]


def measure(name: str, stage: Stage, args: argparse.Namespace) -> tuple[list[dict], bool]:
    """Run a stage's programs in turn: -> (its rows, whether all did the same work)."""
    reports, versions, whole = collections.defaultdict(list), {}, True
    cores = len(os.sched_getaffinity(0))
    for repeat in range(1 if args.smoke else args.repeats):
        for program in stage.programs:
            choices = (cores,) if args.gpu else [n for n in program.threads if n <= cores]
            for threads in choices or (1,):
                command = command_of(program, stage, threads, args.smoke, args.python)
                found = run(command)
                whole &= bool(found)
                for report in found:
                    key = report["program"], report["threads"]
                    reports[key].append(report)
                    versions[key[0]] = version_of(program, key[0])
                    median = np.median(report["seconds"])
                    text = (
                        f"  {name} {repeat + 1} {key[0]}, {key[1]} threads: {median:.4f} s a round"
                    )
                    print(text, flush=True)
    ratios = paired_ratios(reports) if name.startswith("pair") else {}
    result = [
        row_of(name, stage, versions[key[0]], group) | (ratios if key[0] == OURS else {})
        for key, group in reports.items()
    ]
    return result, same_work(result) and whole


def version_of(program: Program, name: str) -> str:
    """Look a peer's version up in its requirements; a script may report on several programs, by name."""
    if program.package is None:
        return machine.describe()["h2tune_jax" if name.startswith(OURS) else "jax"]
    lines = (PEERS / "requirements" / f"{program.venv}.txt").read_text().splitlines()
    return next(v for n, _, v in (line.partition("==") for line in lines) if n == program.package)


def row_of(name: str, stage: Stage, version: str, group: list[dict]) -> dict:
    """Sum up one program's processes."""
    first, about = group[0], machine.describe()
    times = machine.spread([second for report in group for second in report["seconds"]])
    tokens = first.get("tokens")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "stage": name,
        "program": first["program"],
        "version": version,
        "threads": first["threads"],
        "clients": first["clients"],
        "steps": stage.steps,
        "rounds": sum(len(report["seconds"]) for report in group),
        "processes": len(group),
        "seconds": times.median,
        "seconds_low": times.low,
        "seconds_high": times.high,
        "clients_per_second": first["clients"] / times.median,
        "tokens_per_second": None if tokens is None else tokens / times.median,
        "check": first["check"],
        **{column: about[column] for column in ("device", "cores", "python", "jax")},
    }


def paired_ratios(reports: Mapping[tuple[str, int], list[dict]]) -> dict[str, float]:
    """h2tune_jax over the better bare loop, round by round, with a 95 % bootstrap interval.

    Each side has its better number of threads. Where these are equal, the two rounds of a pair ran one
    after the other.
    """
    seconds = {
        key: np.concatenate([report["seconds"] for report in group])
        for key, group in reports.items()
    }
    ours = [values for (program, _), values in seconds.items() if program == OURS]
    bare = [values for (program, _), values in seconds.items() if program != OURS]
    if not ours or not bare:
        return {}
    ratios = min(ours, key=np.median) / min(bare, key=np.median)
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    values = {"ratio": np.median(ratios), "ratio_low": low, "ratio_high": high}
    return {name: float(value) for name, value in values.items()}


def same_work(result: list[dict]) -> bool:
    """Compare the checks of programs that ran equally many clients."""
    same = True
    for clients in {row["clients"] for row in result}:
        # The MLP's check is a round of all clients, whatever the rounds that were timed.
        group = [row for row in result if row["clients"] == clients]
        for row in group:
            if abs(row["check"] / group[0]["check"] - 1) > AGREE:
                print(f"  {row['program']}: other work: {row['check']} for {group[0]['check']}")
                same = False
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", help=f"comma-separated, of {', '.join(STAGES)}")
    parser.add_argument("--repeats", type=int, default=5, help="processes a program")
    parser.add_argument("--smoke", action="store_true", help="every program once; no rows")
    parser.add_argument(
        "--gpu", action="store_true", help="64 MiniLM clients against torch on CUDA"
    )
    parser.add_argument(
        "--python", action="append", default=[], metavar="VENV=PATH", help="another interpreter"
    )
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.python = dict(pair.split("=", 1) for pair in args.python)
    known = GPU_STAGES if args.gpu else STAGES
    good = True
    for name in args.stages.split(",") if args.stages else known:
        print(f"{name}:", flush=True)
        result, same = measure(name, known[name], args)
        good &= same
        if not args.smoke:
            rows.append(args.csv, result, COLUMNS)
    print("all programs did the same work" if good else "see above: some failed or did other work")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

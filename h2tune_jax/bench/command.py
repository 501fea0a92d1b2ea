"""The command: choose cases, measure each in a process of its own, write rows, a table and a plot."""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from h2tune_jax.bench.cases import MODELS, Case, default_plan, product_plan, quick_plan
from h2tune_jax.types import FederationError

FLAGS = {  # field of a case -> how a value of its flag is read
    "clients": int,
    "axis": str,
    "rank": int,
    "kernels": str,
    "devices": int,
    "batch": int,
    "length": int,
    "steps": int,
    "dtype": str,
    "method": str,
}
ROW = "ROW "
SMALL = 768  # rows of the matrices of a smoke run: a rate well below the peak, in no time


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command: 0, 1 where a case failed (one that does not fit has not), or 2 on bad flags."""
    args = _parser().parse_args(arguments)
    if args.probe:
        print(ROW + json.dumps(_probe()), flush=True)
        return 0
    if args.case is not None:
        return _measure_one(Case(**json.loads(args.case)), args)
    # The process that starts the others holds no device: on a GPU it would keep its memory.
    probed = _probe(SMALL) if args.quick else _child(["--probe"])
    if probed is None:
        return 1
    try:
        cases = _choose(args, probed)
    except FederationError as error:
        print(f"h2tune bench: {error}", file=sys.stderr)
        return 2
    if args.list:
        print(*(case.title for case in cases), sep="\n")
        return 0
    return _measure_all(cases, args, probed)


def _probe(size: int | None = None) -> dict[str, Any]:
    """Look at the machine. On the CPU a core is a device, in the processes that measure."""
    import jax

    from h2tune_jax.bench import machine

    backend = jax.default_backend()
    return {
        "backend": backend,
        "devices": os.cpu_count() or 1 if backend == "cpu" else jax.device_count(),
        "about": machine.describe(),
        "peaks": {
            dtype: tuple(machine.matrix_peak(dtype, size=size)) for dtype in ("float32", "bfloat16")
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="h2tune bench",
        description="Measure this machine. Without a selection: one thing at a time is varied round "
        "each model's default size. With one: all combinations of the values given.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of seconds, in one process"
    )
    parser.add_argument("--models", help=f"comma-separated: {', '.join(MODELS)}")
    for field, kind in FLAGS.items():
        parser.add_argument(f"--{field}", help=f"comma-separated values ({kind.__name__})")
    parser.add_argument("--runs", type=int, default=7, help="timed rounds a case")
    parser.add_argument("--compiles", type=int, default=3, help="timed compilations a case")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="skip a case whose rounds might take longer"
    )
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--plot", type=Path, help="draw the rows into this file (extra `plot`)")
    parser.add_argument(
        "--trace",
        type=Path,
        help="trace one more round of each case into this folder, and sum it up",
    )
    parser.add_argument("--list", action="store_true", help="print the cases, and measure nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--peaks", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    return parser


def _choose(args: argparse.Namespace, probed: dict[str, Any]) -> list[Case]:
    backend, devices = probed["backend"], probed["devices"]
    chosen = {field: getattr(args, field) for field in FLAGS if getattr(args, field) is not None}
    if args.quick:
        return quick_plan(backend)
    if args.models is None and not chosen:
        return default_plan(backend, devices)
    models = args.models.split(",") if args.models else [name for name in MODELS if name != "tiny"]
    values = {field: [_read(field, v) for v in text.split(",")] for field, text in chosen.items()}
    return product_plan(backend, models, **values)


def _read(field: str, text: str) -> Any:
    try:
        return FLAGS[field](text)
    except ValueError as error:
        raise FederationError(f"--{field}: {text!r} is no {FLAGS[field].__name__}") from error


# --- one case --------------------------------------------------------------------------------------


def _measure_one(case: Case, args: argparse.Namespace) -> int:
    """Measure in this process; the row goes to standard output as JSON."""
    import jax

    if case.devices > 1:
        jax.config.update("jax_num_cpu_devices", case.devices)  # before the backend starts
    print(ROW + json.dumps(_row(case, args, args.peaks)), flush=True)
    return 0


def _row(case: Case, args: argparse.Namespace, peaks: dict[str, Any]) -> dict[str, Any]:
    import dataclasses

    from h2tune_jax.bench import machine
    from h2tune_jax.bench.measure import Limits, measure
    from h2tune_jax.bench.workload import Unavailable

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = {"time": now, **dataclasses.asdict(case), **machine.describe(), "skipped": None}
    peak, limits = (
        machine.Spread(*peaks[case.dtype]),
        Limits(args.runs, args.compiles, args.seconds),
    )
    trace = None if args.trace is None else args.trace / case.title.replace(" ", "-")
    try:
        return row | measure(case, limits, peak, trace=trace)
    except Unavailable as reason:
        return row | {"skipped": str(reason)}


# --- all of them -----------------------------------------------------------------------------------


def _measure_all(cases: list[Case], args: argparse.Namespace, probed: dict[str, Any]) -> int:
    from h2tune_jax.bench import rows, table

    print(*(f"{name}: {value}" for name, value in probed["about"].items()), sep=", ")
    for dtype, peak in probed["peaks"].items():
        rates = table.with_spread(*(value / 1e9 for value in peak))
        print(f"a large matrix product in {dtype}: {rates} GFLOP/s")
    args.runs, args.compiles = (3, 1) if args.quick else (args.runs, args.compiles)
    measured, failed = [], 0
    for case in cases:
        print(f"{case.title} ...", end=" ", flush=True)
        row = (
            _row(case, args, probed["peaks"]) if args.quick else _in_own_process(case, args, probed)
        )
        if row is None:
            failed += 1
            continue
        measured.append(row)
        print(f"skipped: {row['skipped']}" if row["skipped"] else "done", flush=True)
        if args.csv is not None:  # at once: an interrupted run keeps what it has
            rows.append(args.csv, [row])
    print()
    print(table.plain(table.HEADS, [table.cells(row) for row in measured]))
    if args.trace is not None:
        _print_traces(measured)
    if args.plot is not None:
        from h2tune_jax.bench import plot

        plot.draw(measured, args.plot)
        print(f"plot: {args.plot}")
    return 1 if failed else 0


def _in_own_process(
    case: Case, args: argparse.Namespace, probed: dict[str, Any]
) -> dict[str, Any] | None:
    """Measure in a fresh process: peak memory is the case's own, and one that dies takes no other along."""
    import dataclasses

    flags = ["--case", json.dumps(dataclasses.asdict(case)), "--peaks", json.dumps(probed["peaks"])]
    for name in ("runs", "compiles", "seconds", "trace"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    return _child(flags)


def _child(flags: list[str]) -> dict[str, Any] | None:
    """Run this command in a fresh process: -> what it printed, or None after saying how it failed."""
    done = subprocess.run(
        [sys.executable, "-m", "h2tune_jax.bench", *flags], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(ROW)]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1].removeprefix(ROW))
    said = (done.stderr.strip() or "no message").splitlines()[-1]
    print(f"failed with exit code {done.returncode}: {said}", flush=True)
    return None


def _print_traces(measured: list[dict[str, Any]]) -> None:
    from h2tune_jax.bench import table, trace

    for row in measured:
        if row["skipped"]:
            continue
        folder = Path(row["trace"])
        events = trace.read(trace.find(folder))
        where = trace.sources((folder / trace.PROGRAM).read_text())
        spent = trace.summarise(events, where)
        lines = [
            (f"{100 * s.share:.1f} %", f"{1e3 * s.seconds:.2f}", str(s.calls), s.operation, s.where)
            for s in spent[:15]
        ]
        print(f"\n{folder}: where the time of one round went, over all threads")
        print(table.plain(("share", "ms", "calls", "operation", "from"), lines))
        print(f"the whole trace: open {trace.find(folder)} at https://ui.perfetto.dev")

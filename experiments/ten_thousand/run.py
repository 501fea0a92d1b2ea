"""Ten thousand clients, each with an adapter and an optimiser's state of its own, on a small machine.

    python experiments/ten_thousand/run.py [--out runs/ten-thousand] [--rounds 20] [--die-after N]

Called again with the same folder it goes on where it stopped; `--die-after N` kills the process (SIGKILL)
when the metrics of the N-th round are in. Prints what the run took and left, and a digest of its end.
"""

import argparse
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from h2tune_jax.run import checkpoint, load_config, simulate
from h2tune_jax.run.checkpoint import read_manifest, state_digest, steps
from h2tune_jax.run.events import Notice, RoundDone, Saved
from h2tune_jax.run.folder import RunFolder
from h2tune_jax.run.records import read_lines
from h2tune_jax.run.row_store import clients_of

HERE = Path(__file__).parent


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def tell(event) -> None:
    if isinstance(event, RoundDone):
        losses = [loss for loss in event.record["cohorts"]["minilm"]["loss"] if loss is not None]
        seconds, loss = event.timing["seconds"], sum(losses) / len(losses)
        print(f"round {event.record['round']}: {seconds:.1f} s, loss {loss:.3f}", flush=True)
    elif isinstance(event, Saved):
        print(f"  checkpoint of round {event.round}: {event.seconds:.1f} s", flush=True)
    elif isinstance(event, Notice):
        print(f"  {event.text}", flush=True)


tell.shows_notices = True


def dying_after(rounds: int):
    def watch(event) -> None:
        if isinstance(event, RoundDone) and event.record["round"] + 1 == rounds:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch


def folder_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def end_digest(out: Path) -> str:
    """Return a digest of the server and of every client that trained, read one at a time."""
    arrays, meta = checkpoint.read_arrays(out)
    parts = {path: value for path, value in arrays.items() if path.startswith(".server")}
    for client in arrays[".index[0]"][0].tolist():
        _, found = clients_of(RunFolder(out), arrays, meta, 0, [client])
        parts[f"client {client}"] = np.frombuffer(bytes.fromhex(state_digest(found)), np.uint8)
    return state_digest(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ten-thousand"))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--die-after", type=int)
    args = parser.parse_args()

    config = load_config(HERE / "config.toml", [f"rounds={args.rounds}"])
    observers = [tell] if args.die_after is None else [tell, dying_after(args.die_after)]
    began = time.perf_counter()
    simulate(config, out=args.out, resume=True, observers=observers)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )

    folder = RunFolder(args.out)
    newest = steps(folder)[-1]
    manifest = read_manifest(folder, newest)
    marks, layout = manifest["beside"], manifest["meta"]["layouts"][0]
    row = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for _, dtype, shape in layout)
    seen = manifest["arrays"][".index[0]"][1][1]
    named = set()
    for line in read_lines(folder.metrics):
        named |= set(line["cohorts"]["minilm"]["clients"])
    assert seen == len(named), (seen, len(named))

    count = config.groups[0].count
    print(f"this process: {seconds:.0f} s, peak resident memory {megabytes(peak)}")
    print(f"one client: {row / 1e6:.2f} MB; all {count:,} would be {row * count / 1e9:.1f} GB")
    print(f"clients seen: {seen}, {megabytes(seen * row)}")
    print(
        f"on the disk: clients {megabytes(folder_size(folder.clients))} in {len(marks) - 1} files, "
        f"checkpoints {megabytes(folder_size(folder.checkpoints))}"
    )
    print(f"digest of the end: {end_digest(args.out)}")


if __name__ == "__main__":
    main()

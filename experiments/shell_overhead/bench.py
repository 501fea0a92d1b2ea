"""What the shell costs over the same rounds called by hand from the core.

A run of so many rounds in a folder of its own (metrics and timings written, checkpoints every 10 rounds,
a test of every client at the end) against `make_round` and `make_evaluate` called in a loop: H2Tune on
random BERT-like models, two groups of four clients, with as many local epochs as make a round last the
wished time. Both start their clients anew, and have compiled before. The two sides of a pair follow each
other, in turning order, so that a drift of the machine meets both.

    python experiments/shell_overhead/bench.py [--pairs 15] [--rounds 20] [--seconds 1.2] [--csv FILE]
"""

import argparse
import csv
import json
import math
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import h2tune_jax as h2
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.config import config_digest, config_toml, make_config
from h2tune_jax.run.federation import build_federation
from h2tune_jax.run.folder import RunFolder, begin_folder, lock_folder
from h2tune_jax.run.loop import run_rounds
from h2tune_jax.run.programs import Programs

WORDS = ("amber", "birch", "cedar", "dusk", "ember", "frost", "grove", "haze", "iris", "jade")


def write_data(path: Path) -> None:
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(1500):
            chosen = rng.integers(len(WORDS), size=6)
            label = "low" if chosen.sum() < 27 else "high"
            text = " ".join(WORDS[i] for i in chosen)
            file.write(json.dumps({"text": text, "label": label}) + "\n")


def make_settings(data: Path, rounds: int, epochs: int):
    def group(name: str, width: int, layers: int) -> dict:
        shape = {"family": "bert", "width": width, "layers": layers, "heads": 4,
                 "mlp_width": 4 * width, "max_positions": 64}  # fmt: skip
        return {
            "name": name,
            "count": 4,
            "model": {"source": "random", "tokenizer": "bytes", "shape": shape, "pooling": "mean"},
            "task": {"data": str(data), "train": 64, "test": 64, "max_length": 48},
            "budget": {"batch_size": 16, "epochs": epochs},
        }

    return make_config(
        {
            "rounds": rounds,
            "method": {"name": "h2tune", "rank": 8, "learning_rate": 1e-3},
            "evaluation": {"every": 0, "batch_size": 64},
            "checkpoints": {"every": 10},
            "groups": [group("small", 96, 2), group("large", 128, 4)],
        }
    )


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.2, help="of a round, at least about")
    parser.add_argument("--csv", help="append the row to this file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "words.jsonl"
        write_data(data)
        by_hand, _ = build(make_settings(data, args.rounds, 1), Path(scratch))
        by_hand(1)
        began = time.perf_counter()
        by_hand(2)
        epochs = math.ceil(args.seconds / ((time.perf_counter() - began) / 2))
        by_hand, by_shell = build(make_settings(data, args.rounds, epochs), Path(scratch))
        sides = {"hand": lambda: by_hand(args.rounds), "shell": by_shell}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for pair in range(args.pairs + 1):
            for name in sorted(sides, reverse=pair % 2 == 1):
                began = time.perf_counter()
                sides[name]()
                if pair:  # the first compiles
                    times[name].append(time.perf_counter() - began)

    ratios = np.array(times["shell"]) / np.array(times["hand"])
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    hand = statistics.median(times["hand"])
    row = {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "pairs": args.pairs,
        "rounds": args.rounds,
        "round_s": round(hand / args.rounds, 3),
        "hand_s": round(hand, 2),
        "shell_s": round(statistics.median(times["shell"]), 2),
        "ratio": round(float(np.median(ratios)), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }
    print(*(f"{key}: {value}" for key, value in row.items()), sep="\n")
    if args.csv:
        with open(args.csv, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def build(config, scratch: Path):
    """Return the two sides: (rounds -> None) by hand, and () -> None through the shell."""
    method, federation = build_method(config), build_federation(config)
    specs = federation.specs
    bases = jax.device_put(federation.bases)
    train, test = jax.device_put((federation.train, federation.test))
    round_fn = h2.make_round(method, specs)
    evaluate = h2.make_evaluate(method, specs, batch_size=config.evaluation.batch_size)
    seed = np.uint32(config.seed)

    def by_hand(rounds: int) -> None:
        state = h2.init_round(method, specs, bases, None, jax.random.key(config.seed))
        for _ in range(rounds):
            state, _ = round_fn(state, bases, train, None, None, method.hyper, seed)
        jax.block_until_ready(evaluate(state, bases, test))

    programs = Programs(method, specs, federation.bases, None, config)

    def by_shell() -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as home:
            folder = RunFolder(Path(home))
            with lock_folder(folder):
                text, digest = config_toml(config), config_digest(config)
                begin_folder(folder, text, digest, {}, resume=False)
                run_rounds(method, federation, config, folder=folder, programs=programs)

    return by_hand, by_shell


if __name__ == "__main__":
    main()

"""What a client costs as a round grows: the MLP round of 16, 100, 1,000 and 10,000 clients, in turn.

    python experiments/throughput/flat.py [--turns 7] [--csv FILE]

One turn runs every size, small sizes for as many rounds as give a comparable time, so that a drift of the
machine meets them all. `everyone` rounds hold as many clients as take part; `sampled` rounds draw 16 of
10,000 by their ids. 10,000 clients hold 3.1 GB of data; what does not fit is left out and said.
"""

import argparse
import datetime
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import h2tune_jax as h2
from h2tune_jax.bench import machine, rows
from h2tune_jax.bench.cases import default_case
from h2tune_jax.bench.workload import build
from h2tune_jax.types import ClientData

SIZES, ALTOGETHER, MOST_ROUNDS = (16, 100, 1000, 10_000), 2000, 60
RESULTS = Path(__file__).parent / "results" / "flat.csv"
COLUMNS = (
    "time", "population", "participants", "kind", "turns", "seconds_per_client", "low", "high",
    "device", "cores", "python", "jax",
)  # fmt: skip
WHOLE = frozenset(("population", "participants", "turns", "cores"))
NUMBERS = frozenset(("seconds_per_client", "low", "high"))


def program(clients: int, data: ClientData, sampled: int | None):
    """Build a function of so many rounds that gives the seconds a client."""
    load = build(default_case("mlp", jax.default_backend(), clients=clients))
    round_fn = h2.make_round(load.method, load.specs)
    own = jax.tree.map(lambda leaf: leaf[:clients], data)
    state = h2.init_round(load.method, load.specs, ((),), None, jax.random.key(0))
    rng, count = np.random.default_rng(0), sampled or clients

    def run(rounds: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(rounds):
            ids = None
            if sampled is not None:
                ids = (jnp.asarray(rng.choice(clients, sampled, replace=False), jnp.int32),)
            state, _ = round_fn(state, ((),), (own,), ids, None, load.method.hyper, np.uint32(0))
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / (rounds * count)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--sizes", help=f"comma-separated; {','.join(map(str, SIZES))}")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")] if args.sizes else list(SIZES)
    each = 2 * 100 * 785 * 4  # a client's data, there twice while it is cut
    for size in list(sizes):
        if size * each > 0.9 * machine.free_memory():
            print(f"{size} clients: skipped, {size * each / 1e9:.1f} GB do not fit")
            sizes.remove(size)
    case = default_case("mlp", jax.default_backend(), clients=max(sizes))
    data = build(case).make_data()
    programs = {(size, size): program(size, data, None) for size in sizes}
    if max(sizes) > min(sizes):
        programs[max(sizes), min(sizes)] = program(max(sizes), data, min(sizes))
    seconds = {key: [] for key in programs}
    for turn in range(1 + args.turns):
        for key, run in programs.items():
            spent = run(max(1, min(MOST_ROUNDS, ALTOGETHER // key[1])))
            if turn:  # the first compiles
                seconds[key].append(spent)
    about, result = machine.describe(), []
    for (population, participants), values in seconds.items():
        cost = machine.spread(values)
        result.append({
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "population": population,
            "participants": participants,
            "kind": "everyone" if population == participants else "sampled",
            "turns": args.turns,
            "seconds_per_client": cost.median,
            "low": cost.low,
            "high": cost.high,
            **{column: about[column] for column in ("device", "cores", "python", "jax")},
        })  # fmt: skip
        print(f"{participants} of {population}: {1e6 * cost.median:.1f} us a client "
              f"({1e6 * cost.low:.1f}-{1e6 * cost.high:.1f})")  # fmt: skip
    rows.append(args.csv, result, COLUMNS)


if __name__ == "__main__":
    main()

"""What the engine costs over JAX written by hand.

A FedAvg round on 200 clients x 100 examples, a 784-128-62 MLP, batch 20, one epoch, plain SGD: through
`make_round`, against the better of a bare `scan` and a bare `vmap` over clients. Rounds are timed in
turn, so that a drift of the machine meets both sides of a pair; each after one of its own that is not
timed, because what runs after the vmap finds its caches cold, and the turn rotates. On one core and on all
of them, each in a process of its own; either side is judged by its better.

    python experiments/engine_overhead/bench.py [--pairs 121] [--cores 1] [--csv FILE]
"""

import argparse
import csv
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import h2tune_jax as h2

CLIENTS, EXAMPLES, BATCH, RATE = 200, 100, 20, 0.1


def init(key):
    one, two = jax.random.split(key)
    return {
        "w1": 0.03 * jax.random.normal(one, (784, 128)),
        "b1": jnp.zeros(128),
        "w2": 0.08 * jax.random.normal(two, (128, 62)),
        "b2": jnp.zeros(62),
    }


def cross_entropy(params, x, y):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]


# --- by hand ---------------------------------------------------------------------------------------


def local(params, x, y, key):
    order = jax.random.permutation(key, EXAMPLES)
    batches = x[order].reshape(-1, BATCH, 784), y[order].reshape(-1, BATCH)

    def step(p, batch):
        grads = jax.grad(lambda p: cross_entropy(p, *batch).mean())(p)
        return jax.tree.map(lambda p, g: p - RATE * g, p, grads), None

    after, _ = jax.lax.scan(step, params, batches)
    return jax.tree.map(jnp.subtract, after, params)


@jax.jit
def bare_vmap(params, x, y, keys):
    deltas = jax.vmap(local, (None, 0, 0, 0))(params, x, y, keys)
    return jax.tree.map(lambda p, d: p + d.mean(axis=0), params, deltas)


@jax.jit
def bare_scan(params, x, y, keys):
    add = lambda total, xs: (jax.tree.map(jnp.add, total, local(params, *xs)), None)
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (x, y, keys))
    return jax.tree.map(lambda p, t: p + t / CLIENTS, params, total)


# --- through the engine ----------------------------------------------------------------------------


def loss_fn(adapters, base, batch, key):
    losses = cross_entropy(adapters.head, batch.examples["x"], batch.examples["y"])
    mask = batch.mask.astype(losses.dtype)
    return (losses * mask).sum() / mask.sum(), {}


def measure(cores: int, pairs: int) -> dict[str, Any]:
    """Time interleaved rounds on so many cores, in a process of its own."""
    # Before the backend starts its threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(CLIENTS, EXAMPLES, 784)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 62, (CLIENTS, EXAMPLES)), jnp.int32)
    keys = jax.random.split(jax.random.key(0), CLIENTS)

    method = h2.fedavg(learning_rate=RATE)
    spec = h2.CohortSpec(
        name="mlp",
        num_clients=CLIENTS,
        model=h2.ModelSpec(num_layers=1, sites={}),
        rank=1,
        loss_fn=loss_fn,
        init_head_fn=init,
        budget=h2.Budget(batch_size=BATCH, epochs=1),
    )
    data = h2.ClientData({"x": x, "y": y}, jnp.full(CLIENTS, EXAMPLES, jnp.int32))
    start = lambda: h2.init_round(method, (spec,), ((),), None, jax.random.key(0))
    round_fn = h2.make_round(method, (spec,))
    everyone = (None,)
    programs = {
        "engine": lambda state: round_fn(
            state, ((),), (data,), everyone, everyone, method.hyper, np.uint32(0)
        )[0],
        "bare_scan": lambda params: bare_scan(params, x, y, keys),
        "bare_vmap": lambda params: bare_vmap(params, x, y, keys),
    }
    carries = {"engine": start(), "bare_scan": init(jax.random.key(0))}
    carries["bare_vmap"] = carries["bare_scan"]
    times = {name: [] for name in programs}
    for pair in range(pairs + 2):
        names = list(programs)
        for name in names[pair % 3 :] + names[: pair % 3]:
            # A round that is not timed first: what ran before, above all the vmap, leaves cold caches.
            carries[name] = jax.block_until_ready(programs[name](carries[name]))
            began = time.perf_counter()
            carries[name] = jax.block_until_ready(programs[name](carries[name]))
            if pair >= 2:  # the first two compile and warm up
                times[name].append(time.perf_counter() - began)

    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min("bare_scan", "bare_vmap", key=medians.get)
    ratios = np.array(times["engine"]) / np.array(times[best])
    draws = rng.choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "pairs": pairs,
        **{f"{name}_ms": round(1e3 * value, 1) for name, value in medians.items()},
        "best": best,
        "ratio": round(float(np.median(ratios)), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=121)
    parser.add_argument("--cores", type=int, help="of the CPU; one, and all of them, by default")
    parser.add_argument("--csv", help="append the rows to this file")
    args = parser.parse_args()
    every = len(os.sched_getaffinity(0))
    found = []
    for cores in (1, every) if args.cores is None else (args.cores,):
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            row = pool.submit(measure, cores, args.pairs).result()
        print(*(f"{key}: {value}" for key, value in row.items()), "", sep="\n", flush=True)
        found.append(row)
    engine = min(found, key=lambda row: row["engine_ms"])
    bare = min(found, key=lambda row: row[f"{row['best']}_ms"])
    print(
        f"engine on {engine['cores']} cores {engine['engine_ms']} ms, best bare loop "
        f"({bare['best']} on {bare['cores']} cores) {bare[bare['best'] + '_ms']} ms"
    )
    if engine is bare:
        print(f"each at its best: {engine['ratio']} [{engine['low']}-{engine['high']}]")
    if args.csv:
        with open(args.csv, "a", newline="") as file:
            writer = csv.DictWriter(file, found[0])
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()

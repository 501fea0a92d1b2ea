"""What a round of H2Tune costs to compile, by depth of the model and by number of clients.

A residual model with q and v sites of width 64, rank 4, R = 8: 6 layers against 30, and 8 clients against
256. Layers are stacked and scanned over, and clients are an array axis, so neither should matter much.
Sizes are compiled in turn, several times; what is timed is tracing, lowering and compiling together.

    python experiments/compile_time/bench.py [--repeats 5] [--csv FILE]
"""

import argparse
import csv
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import h2tune_jax as h2

WIDTH = 64


def loss_fn(adapters, base, batch, key):
    def block(hidden, layer):
        weights, sites = layer
        for kind in ("q", "v"):
            hidden = hidden + jnp.tanh(h2.adapted(hidden, weights[kind], sites[kind]))
        return hidden, None

    hidden, _ = jax.lax.scan(block, batch.examples["x"], (base, adapters.sites))
    logits = hidden @ adapters.head
    labels = jax.nn.one_hot(batch.examples["y"], 4)
    losses = -(labels * jax.nn.log_softmax(logits)).sum(axis=1)
    mask = batch.mask.astype(losses.dtype)
    return (losses * mask).sum() / mask.sum(), {"logits": logits}


def compile_once(client_axis, layers, clients):
    method = h2.h2tune(shared_rank=8)
    spec = h2.CohortSpec(
        name="one",
        num_clients=clients,
        model=h2.ModelSpec(num_layers=layers, sites=dict.fromkeys(("q", "v"), (WIDTH, WIDTH))),
        rank=4,
        loss_fn=loss_fn,
        init_head_fn=lambda key: 0.02 * jax.random.normal(key, (WIDTH, 4)),
        budget=h2.Budget(batch_size=8, epochs=1),
    )
    base = {k: jnp.zeros((layers, WIDTH, WIDTH)) for k in ("q", "v")}
    examples = {"x": jnp.zeros((clients, 16, WIDTH)), "y": jnp.zeros((clients, 16), jnp.int32)}
    data = h2.ClientData(examples, jnp.full(clients, 16, jnp.int32))
    init = lambda key: h2.init_round(method, (spec,), (base,), None, key)
    state = jax.eval_shape(init, jax.random.key(0))
    args = (base,), (data,), (None,), (None,), method.hyper, np.uint32(0)
    began = time.perf_counter()
    h2.make_round(method, (spec,), client_axis=client_axis).lower(state, *args).compile()
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", help="append the rows to this file")
    args = parser.parse_args()
    sizes = {"base": (6, 8), "layers": (30, 8), "clients": (6, 256)}
    rows = []
    for axis in ("scan", "vmap"):
        seconds = {name: [] for name in sizes}
        compile_once(axis, 2, 2)  # the first compilation of a process pays for start-up
        for _ in range(args.repeats):
            for name, size in sizes.items():
                seconds[name].append(compile_once(axis, *size))
        ratio = lambda name, s=seconds: np.array(s[name]) / np.array(s["base"])
        rows.append(
            {
                "client_axis": axis,
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "repeats": args.repeats,
                "seconds_6_layers_8_clients": round(statistics.median(seconds["base"]), 2),
                "ratio_30_layers": round(float(np.median(ratio("layers"))), 3),
                "ratio_30_layers_max": round(float(ratio("layers").max()), 3),
                "ratio_256_clients": round(float(np.median(ratio("clients"))), 3),
                "ratio_256_clients_max": round(float(ratio("clients").max()), 3),
            }
        )
        print(*(f"{key}: {value}" for key, value in rows[-1].items()), "", sep="\n")
    if args.csv:
        with open(args.csv, "a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

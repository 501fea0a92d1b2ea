"""h2tune_jax and the bare JAX loops in one process, rounds in turn: for ratios of a few per cent.

Each after one of its own that is not timed, because what runs after the vmap finds its caches cold; the
turn rotates. Prints a line a program; rounds of equal number belong together.
"""

import time

import bare_jax_mlp
import h2tune_mlp
import numpy as np
import work


def main(args):
    everyone = np.arange(work.CLIENTS, dtype=np.int32)
    programs = {
        "h2tune_jax": h2tune_mlp.build(),
        "bare JAX, scan": bare_jax_mlp.build("scan"),
        "bare JAX, vmap": bare_jax_mlp.build("vmap"),
    }
    names = list(programs)
    check = {
        name: work.mean_loss(params_of(round_fn(start(), everyone)))
        for name, (start, round_fn, params_of) in programs.items()
    }
    states = {name: start() for name, (start, _, _) in programs.items()}
    seconds = {name: [] for name in names}
    rng = np.random.default_rng(2)
    for index in range(work.SKIPPED + args.rounds):
        ids = rng.choice(work.CLIENTS, args.clients, replace=False).astype(np.int32)
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            states[name] = programs[name][1](states[name], ids)
            began = time.perf_counter()
            states[name] = programs[name][1](states[name], ids)
            seconds[name].append(time.perf_counter() - began)
    for name in names:
        work.report(name, args, seconds[name][work.SKIPPED :], check[name])


if __name__ == "__main__":
    main(h2tune_mlp.ARGS)

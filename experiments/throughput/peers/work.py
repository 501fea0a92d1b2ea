"""The work that every program of the MLP comparison does, and how each of them is timed.

200 clients x 100 examples (784 features, 62 classes, synthetic), an MLP 784-128-62, batches of 20 in the
order in which the examples stand, one epoch of plain SGD, FedAvg with equal weights, float32.

Needs numpy alone, so that every environment can import it. A program gives `measure` two functions: one
that starts over, and one that runs a round for the clients it is given.
"""

import argparse
import json
import os
import time

CLIENTS, EXAMPLES, FEATURES, HIDDEN, CLASSES, BATCH, RATE = 200, 100, 784, 128, 62, 20, 0.1
STEPS = EXAMPLES // BATCH
SKIPPED = 3  # first rounds, which compile and warm up


def pin(threads):
    """Keep this process to so many cores; to be called before numpy, torch or jax is imported."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(min(threads, len(cores)))


def parse(**extra):
    """Read the command line that all programs share, and pin the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=20, help="clients a round")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    parser.add_argument("--threads", type=int, default=2, help="cores this process may use")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    pin(args.threads)
    return args


def make_data():
    """Examples f32[C, n, 784] and labels i32[C, n] of all clients."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((CLIENTS, EXAMPLES, FEATURES), np.float32)
    return x, rng.integers(0, CLASSES, (CLIENTS, EXAMPLES), np.int32)


def make_start():
    """Build the model that every program starts from: {w1, b1, w2, b2}, used as x @ w + b."""
    import numpy as np

    rng = np.random.default_rng(1)
    draw = lambda scale, *shape: (scale * rng.standard_normal(shape)).astype(np.float32)
    return {
        "w1": draw(0.03, FEATURES, HIDDEN),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": draw(0.08, HIDDEN, CLASSES),
        "b2": np.zeros(CLASSES, np.float32),
    }


def mean_loss(params):
    """Cross-entropy of a model over all clients' examples, in float64."""
    import numpy as np

    x, y = make_data()
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    x, y = x.reshape(-1, FEATURES).astype(np.float64), y.reshape(-1)
    logits = np.maximum(x @ p["w1"] + p["b1"], 0) @ p["w2"] + p["b2"]
    logits -= logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]).mean())


def measure(program, args, start, round_fn, params_of):
    """Time rounds of sampled clients, and print one JSON line.

    Args:
      program: its name.
      args: from `parse`.
      start: () -> state.
      round_fn: (state, ids i32[S]) -> state, finished when it returns.
      params_of: state -> {w1, b1, w2, b2}.

    The line's `check` is the loss after one round of all clients from the common start: programs that
    did the same work have the same number there.
    """
    import numpy as np

    everyone = np.arange(CLIENTS, dtype=np.int32)
    check = mean_loss(params_of(round_fn(start(), everyone)))
    rng, state, seconds = np.random.default_rng(2), start(), []
    for _ in range(SKIPPED + args.rounds):
        began = time.perf_counter()
        ids = rng.choice(CLIENTS, args.clients, replace=False).astype(np.int32)
        state = round_fn(state, ids)
        seconds.append(time.perf_counter() - began)
    report(program, args, seconds[SKIPPED:], check)


def report(program, args, seconds, check, **more):
    """Print the line that the runner reads."""
    line = {
        "program": program,
        "clients": args.clients,
        "threads": args.threads,
        "seconds": seconds,
        "check": check,
        **more,
    }
    print("RESULT " + json.dumps(line), flush=True)

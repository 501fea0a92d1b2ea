"""The work that every program of the fine-tuning comparison does.

LoRA on MiniLM-L6 with its real weights: adapters of rank 8 (alpha 16) on query and value, a linear
classifier of 6 classes on the mean of the last hidden states. Every client takes so many steps of Adam
(1e-3, restarted every round) on batches of 32 texts x 32 tokens (random ids, no padding), in order;
then adapters are averaged with equal weights, and heads stay with their clients. float32.

`check` is the mean training loss of the second round of a fresh start, over clients and steps: it
depends on what the first round trained and on how it was averaged.
"""

from pathlib import Path

LAYERS, WIDTH, RANK, ALPHA, CLASSES, BATCH, LENGTH, RATE = 6, 384, 8, 16.0, 6, 32, 32, 1e-3
TOKENS_A_STEP = BATCH * LENGTH
SITES = ("q", "v")
ASSET = Path(__file__).parents[3] / "assets" / "minilm"


def make_data(clients, steps):
    """Token ids i32[C, n, T] and labels i32[C, n], n = steps * BATCH."""
    import numpy as np

    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 30000, (clients, steps * BATCH, LENGTH), np.int32)
    return ids, rng.integers(0, CLASSES, (clients, steps * BATCH), np.int32)


def make_start():
    """Draw what all clients start from: {"a": {site: [Li, D, r]}, "b": ..., "w": [D, V], "bias": [V]}."""
    import numpy as np

    rng = np.random.default_rng(1)
    draw = lambda *shape: (0.05 * rng.standard_normal(shape)).astype(np.float32)
    return {
        "a": {site: draw(LAYERS, WIDTH, RANK) for site in SITES},
        "b": {site: np.zeros((LAYERS, RANK, WIDTH), np.float32) for site in SITES},
        "w": draw(WIDTH, CLASSES),
        "bias": np.zeros(CLASSES, np.float32),
    }


def measure(program, args, start, round_fn):
    """Time rounds of all clients, and print the line that the runner reads.

    `round_fn(state) -> (state, mean training loss)`, finished when it returns.
    """
    import time

    import work

    state, _ = round_fn(start())  # compiles and warms up
    state, check = round_fn(state)
    seconds = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        state, _ = round_fn(state)
        seconds.append(time.perf_counter() - began)
    tokens = args.clients * args.steps * TOKENS_A_STEP
    work.report(program, args, seconds, float(check), steps=args.steps, tokens=tokens)

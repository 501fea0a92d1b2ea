"""Three real models, three real tasks, one federation.

MiniLM-L6 learns TREC question classes, a MiniLM of three layers sarcasm in headlines, and a SmolLM2-135M
of six layers the sentiment of film reviews: two clients each, with 128 examples each. H2Tune against every
client alone. Needs `make assets` and the extra `data` (gguf).

    python experiments/three_models/federate.py [--rounds 6] [--examples 128]
"""

import argparse
import time

import jax
import numpy as np

import h2tune_jax as h2
from h2tune_jax import models, tasks
from h2tune_jax.tasks import assets, corpora

LENGTH, TEST = 32, 200


def load_models():
    """(model, base, tokenizer) of each group."""
    folder = assets.fetch("minilm")
    minilm = models.load_hf(folder, pooling="mean")
    tokenizer = models.load_tokenizer(folder)
    file = assets.fetch("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    smollm = models.prune_depth(*models.load_gguf(file), first=6)
    return {
        "minilm-6": (*minilm, tokenizer),
        "minilm-3": (*models.prune_depth(*minilm, every=2), tokenizer),
        "smollm2-6": (*smollm, models.load_gguf_tokenizer(file)),
    }


def load_clients(task, tokenizer, num_clients, num_examples):
    """Train and test data of a group: every client has its own examples, all share the test set."""
    rows = getattr(corpora, f"load_{task}")()
    names = corpora.LABELS[task]
    splits = tasks.split_rows(
        rows, {"train": num_clients * num_examples, "test": TEST}, seed=0, by=lambda r: r["text"]
    )
    rows = [rows[i] for part in splits.values() for i in part]
    encoded = tasks.encode_texts(rows, tokenizer, max_length=LENGTH).examples
    examples = encoded | {"labels": tasks.encode_labels(rows, names)}
    parts = np.arange(num_clients * num_examples).reshape(num_clients, -1)
    test = np.tile(np.arange(parts.size, parts.size + TEST), (num_clients, 1))
    majority = np.bincount(examples["labels"][test[0]]).max() / TEST
    clients = [tasks.make_clients(examples, list(rows)) for rows in (parts, test)]
    return clients, len(names), majority


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--examples", type=int, default=128)
    args = parser.parse_args()

    began = time.perf_counter()
    # A head on SmolLM2's large last states needs a tenth of the rate.
    groups = zip(
        load_models().items(), ("trec", "sarcasm", "rotten_tomatoes"), (8, 4, 8), (1.0, 1.0, 0.1)
    )
    specs, bases, train, test, majority = [], [], [], [], []
    for (name, (model, base, tokenizer)), task, rank, head_factor in groups:
        (own, held_out), classes, share = load_clients(task, tokenizer, 2, args.examples)
        specs.append(
            h2.CohortSpec(
                name=f"{name} on {task}",
                num_clients=2,
                model=model.spec,
                rank=rank,
                loss_fn=tasks.make_loss_fn(
                    tasks.forward_of(model, "classification"), "classification"
                ),
                init_head_fn=model.init_head_fn(classes),
                head_rate_factor=head_factor,
                targets=("q", "v", "up", "down"),
                budget=h2.Budget(batch_size=16, epochs=1),
            )
        )
        bases.append(base)
        train.append(own)
        test.append(held_out)
        majority.append(share)
    specs, bases, train, test = map(tuple, (specs, bases, train, test))
    print(f"models and data: {time.perf_counter() - began:.0f} s")

    accuracy = {}
    for method in (
        h2.h2tune(learning_rate=1e-3, head_rate=1e-2, lambda_norm=1e-3),
        h2.local(learning_rate=1e-3, head_rate=1e-2),
    ):
        began = time.perf_counter()
        round_fn = h2.make_round(method, specs)
        evaluate = h2.make_evaluate(method, specs, batch_size=50)
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        for index in range(args.rounds):
            state, metrics = round_fn(state, bases, train, None, None, method.hyper, np.uint32(0))
            losses = ", ".join(f"{float(m['loss'].mean()):.3f}" for m in metrics.clients.values())
            print(f"{method.name:7} round {index}: loss {losses}", flush=True)
        results = evaluate(state, bases, test)
        accuracy[method.name] = [float(results[s.name]["accuracy"].mean()) for s in specs]
        print(f"{method.name:7} {time.perf_counter() - began:.0f} s, compilation included")

    print(f"\n{'':30}{'majority':>10}" + "".join(f"{name:>10}" for name in accuracy))
    for i, spec in enumerate(specs):
        row = "".join(f"{values[i]:10.3f}" for values in accuracy.values())
        print(f"{spec.name:30}{majority[i]:10.3f}{row}")


if __name__ == "__main__":
    main()

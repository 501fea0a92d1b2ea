"""A two-layer transformer on real questions (TREC), with random frozen weights.

Small, so that hundreds of full-batch gradients fit into minutes on a CPU: what is real is the text, its
six labels and their uneven split over the clients. Words are numbered by how often they occur; the rarer
ones share numbers.
"""

import re
import zlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax import tasks
from h2tune_jax.study.problem import Problem
from h2tune_jax.tasks import corpora
from h2tune_jax.types import Budget, CohortSpec

VOCABULARY, SHARED_NUMBERS = 400, 100  # frequent words with a number of their own, and the others'


def transformer(
    *,
    num_clients: int = 6,
    examples: int = 32,
    heterogeneity: float = 1.0,
    width: int = 32,
    length: int = 12,
    local_steps: int = 2,
    batch_size: int = 8,
    seed: int = 0,
) -> Problem:
    """Build the problem. Needs the asset `trec` (`make assets`) and transformers.

    Args:
      num_clients: of all cohorts together; one half has rank 2, the other rank 4.
      examples: of each client.
      heterogeneity: 1 / alpha of the Dirichlet split of the labels; 0 deals them out evenly.
      width: d, the residual stream.
      length: T, tokens of a question.
      local_steps, batch_size: a round.
      seed: of weights and split.
    """
    from h2tune_jax import models  # reads configs by transformers, which is heavy

    rng = np.random.default_rng(seed)
    config = models.config_from_hf(
        {
            "model_type": "bert",
            "hidden_size": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 2 * width,
            "vocab_size": 2 + VOCABULARY + SHARED_NUMBERS,
            "max_position_embeddings": length,
        },
        pooling="mean",
    )
    model = models.build(config)
    shapes = jax.eval_shape(model.init_fn, jax.random.key(0))
    base = jax.tree_util.tree_map_with_path(lambda path, leaf: _weights(rng, path, leaf), shapes)
    rows = corpora.load_trec()
    chosen = tasks.split_rows(
        rows, {"train": 4 * num_clients * examples}, seed=seed, by=lambda row: row["text"]
    )["train"]
    rows = [rows[i] for i in chosen]
    encoded = encode_words([row["text"] for row in rows], length)
    encoded["labels"] = tasks.encode_labels(rows, corpora.LABELS["trec"])
    parts = _split(encoded["labels"], num_clients, examples, heterogeneity, rng)
    specs, data = [], []
    half = num_clients // 2
    for name, rank, own in (("rank 2", 2, parts[:half]), ("rank 4", 4, parts[half:])):
        specs.append(
            CohortSpec(
                name=name,
                num_clients=len(own),
                model=model.spec,
                rank=rank,
                alpha=8.0 * rank,
                targets=("q", "v", "up", "down"),
                loss_fn=tasks.make_loss_fn(
                    tasks.forward_of(model, "classification"), "classification"
                ),
                init_head_fn=model.init_head_fn(len(corpora.LABELS["trec"])),
                budget=Budget(batch_size=batch_size, steps=local_steps),
            )
        )
        data.append(tasks.make_clients(encoded, own))
    return Problem(
        name="transformer on TREC",
        specs=tuple(specs),
        bases=(base, base),
        data=tuple(data),
        rows=examples,
        runs_at_once=4,
    )


def _weights(rng: np.random.Generator, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Draw a frozen weight that keeps activations of order 1."""
    names = jax.tree_util.keystr(path)
    if "norm" in names or names.endswith("['b']"):
        return jnp.full(leaf.shape, float(names.endswith("['w']")), leaf.dtype)
    fan = leaf.shape[-2] if "layers" in names else 1
    return jnp.asarray(rng.normal(size=leaf.shape) * fan**-0.5, leaf.dtype)


def encode_words(texts: list[str], length: int) -> dict[str, np.ndarray]:
    """Number the words: 0 pads, 1 begins, then the frequent ones, then shared numbers for the rest."""
    words = [re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()) for text in texts]
    counted = Counter(word for row in words for word in row)
    # By count, then by the alphabet, so that equal counts have one order.
    frequent = sorted(counted, key=lambda word: (-counted[word], word))[:VOCABULARY]
    numbers = {word: 2 + place for place, word in enumerate(frequent)}
    rare = lambda word: 2 + VOCABULARY + zlib.crc32(word.encode()) % SHARED_NUMBERS
    ids = np.zeros((len(texts), length), np.int32)
    for place, row in enumerate(words):
        own = [1, *(numbers.get(word, rare(word)) for word in row)][:length]
        ids[place, : len(own)] = own
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int32)}


def _split(labels, num_clients: int, examples: int, heterogeneity: float, rng) -> list[np.ndarray]:
    """Give every client so many examples, with its own mixture of labels."""
    classes = int(labels.max()) + 1
    left = [list(rng.permutation(np.flatnonzero(labels == label))) for label in range(classes)]
    parts = []
    for _ in range(num_clients):
        mixture = np.full(classes, 1 / classes)
        if heterogeneity > 0:
            mixture = rng.dirichlet(np.full(classes, 1 / heterogeneity))
        own = []
        while len(own) < examples:
            weights = mixture * np.array([len(rest) > 0 for rest in left])
            if weights.sum() == 0:
                weights = np.array([len(rest) for rest in left], float)
            own.append(left[rng.choice(classes, p=weights / weights.sum())].pop())
        parts.append(np.sort(np.array(own)))
    return parts

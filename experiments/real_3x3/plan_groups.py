"""The clients of the bench: models, tasks, and the groups of each federation."""

from collections.abc import Mapping
from typing import Any

MINILMS: Mapping[str, Mapping[str, Any]] = {
    "minilm6": {"source": "minilm"},
    "minilm4": {"source": "minilm", "prune": {"layers": [0, 1, 3, 5]}},
    "minilm3": {"source": "minilm", "prune": {"layers": [0, 2, 5]}},
}
# Six models of which no two are one.
DEPTHS: Mapping[str, Mapping[str, Any]] = {
    **MINILMS,
    "minilm5": {"source": "minilm", "prune": {"layers": [0, 1, 2, 4, 5]}},
    "minilm4b": {"source": "minilm", "prune": {"layers": [0, 2, 4, 5]}},
    "minilm3b": {"source": "minilm", "prune": {"layers": [0, 3, 5]}},
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    **DEPTHS,
    # Shallow layers carry a text's meaning in the mean of their tokens, not yet in the last one.
    "smollm2": {"source": "smollm2", "prune": {"first": 6}, "pooling": "mean"},
}
TEXTS: Mapping[str, Mapping[str, Any]] = {
    # Three texts in four are no longer than that; what is padded costs as much as what is read.
    "trec": {"data": "trec", "max_length": 16},
    "sarcasm": {"data": "sarcasm", "max_length": 20},
    "reviews": {"data": "rotten_tomatoes", "max_length": 24},
}
RANK, EXAMPLES, VALIDATION, TEST = 8, 64, 200, 500
BUDGET = {"batch_size": 8, "steps": 8}  # every round, once through 64 examples

# Public texts of none of the tasks, for methods that fit models to each other.
PROBE = {"data": "sms", "count": 64, "max_length": 24}
LARGE_PROBE = {**PROBE, "count": 1024}  # for factors that are fitted on it, one row a text
WIDE_PROBE = {**PROBE, "count": 4096}  # more texts than any site has outputs


def clients(
    model: str, task: str, count: int = 1, *, rank: int = RANK, examples: int = EXAMPLES
) -> dict[str, Any]:
    """Describe the clients of one model and one task."""
    return {
        "name": f"{model}-{task}",
        "count": count,
        "rank": rank,
        "targets": ["q", "v", "up", "down"],
        "model": MODELS[model],
        "task": {**TEXTS[task], "train": examples, "validation": VALIDATION, "test": TEST},
        "budget": BUDGET,
        # One scale, alpha / rank, whatever the rank: that of alpha = 16, the default, at `RANK`.
        **({} if rank == RANK else {"alpha": 16.0 * rank / RANK}),
    }


def pooled(model: str, count: int, **changes: int) -> dict[str, Any]:
    """Describe one client that has the TREC examples and takes the steps of so many."""
    examples = changes.pop("examples", EXAMPLES)
    group = clients(model, "trec", examples=count * examples, **changes)
    return {**group, "budget": {**BUDGET, "steps": count * BUDGET["steps"]}}


def every_pair(**changes: int) -> tuple[dict[str, Any], ...]:
    """Describe one client of every MiniLM and every text task."""
    return tuple(clients(model, task, **changes) for model in MINILMS for task in TEXTS)


def last_groups() -> tuple[dict[str, Any], ...]:
    """Describe the last comparison: two families of models."""
    models = "minilm6", "minilm3", "smollm2"
    return tuple(clients(model, task) for model in models for task in TEXTS)


SHARD_MODEL, SHARD_LAYERS = "minilm4", 4
SHARD_RANKS = (2, 4, 8, 16)
SHARD_EXAMPLES, SERVER_EXAMPLES = 128, 64


def shard_name(rank: int) -> str:
    return f"{SHARD_MODEL}_r{rank}-trec"


def shards() -> tuple[dict[str, Any], ...]:
    """Describe pathological shards of TREC: two clients of every rank, half of the labels each.

    A group is dealt out by itself, so three of six labels is the least that its two clients can hold.
    """
    groups = []
    for rank in SHARD_RANKS:
        group = clients(SHARD_MODEL, "trec", 2, rank=rank, examples=SHARD_EXAMPLES)
        group["name"] = shard_name(rank)
        # One scale for all ranks, so that ranks alone differ.
        group["alpha"] = float(rank)
        group["task"] = {**group["task"], "partition": {"kind": "pathological", "classes": 3}}
        groups.append(group)
    return tuple(groups)


def pooled_shards() -> dict[str, Any]:
    """Describe one client that has the examples and takes the steps of all shards together."""
    count, rank = 2 * len(SHARD_RANKS), max(SHARD_RANKS)
    group = pooled(SHARD_MODEL, count, rank=rank, examples=SHARD_EXAMPLES)
    return {**group, "alpha": float(rank)}


def shard_server() -> dict[str, Any]:
    """Describe the rows of the server's own, which nobody trains or is tested on."""
    group = clients(SHARD_MODEL, "trec", examples=SERVER_EXAMPLES)
    return {**group, "name": f"{SHARD_MODEL}_server-trec"}


def shard_budgets() -> dict[str, int]:
    """Say how many layers of the largest rank cost what all layers of a group's own rank cost.

    One layer is the least: clients of the smallest rank get more than they could afford.
    """
    largest = max(SHARD_RANKS)
    return {shard_name(rank): max(1, round(rank * SHARD_LAYERS / largest)) for rank in SHARD_RANKS}

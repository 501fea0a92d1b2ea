"""The plan of the bench: its settings, its rows, and the rule by which rates are chosen.

THE RULE, fixed before any test number is looked at. In every setting each row is trained at every rate
of its grid, with the seeds `grid_seeds`, and measured on validation rows. The rate with the best mean
accuracy over clients and seeds (a tie goes to the lower one) is trained anew with the seeds `seeds`, and
only those runs are measured on test rows. All of them are kept. A seed gives every row the same examples,
the same heads at the start, and the same factors where shapes are equal, so differences are paired by it.

Every row has the same budget of steps and the same rate of heads. H2Tune's alternation takes two
gradients a step; `h2tune_joint` takes one, as the others do.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FLOOR = "local"
TEST_BATCH = 50
RATES = (3e-4, 1e-3, 3e-3)
COMMON = {"head_rate": 1e-2}


class Row(NamedTuple):
    """A method with its options, as in a config's table `method`."""

    method: str
    options: Mapping[str, Any]
    rates: tuple[float, ...] = RATES


class Setting(NamedTuple):
    """A federation and what is run on it. Groups are those of a config, named "model-task"."""

    name: str
    title: str
    about: str
    groups: tuple[Mapping[str, Any], ...]
    rows: tuple[str, ...]
    rounds: int = 4
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    grid_seeds: tuple[int, ...] = (100,)
    probe: Mapping[str, Any] | None = None


ROWS = {
    "local": Row("local", COMMON),
    "centralised": Row("centralised", COMMON),
    "fedit": Row("fedit", COMMON),
    "ffa_lora": Row("ffa_lora", COMMON),
    "fedsa_lora": Row("fedsa_lora", COMMON),
    "hetlora": Row("hetlora", COMMON),
    "flexlora": Row("flexlora", COMMON),
    "flora": Row("flora", COMMON),
    "fedex_lora": Row("fedex_lora", COMMON),
    "fedra": Row("fedra", COMMON),
    "fed_hello": Row("fed_hello", COMMON),
    "ce_lora": Row("ce_lora", COMMON),
    "co_lora": Row("co_lora", COMMON),
    "heterotune": Row("heterotune", COMMON),
    "h2tune": Row("h2tune", COMMON),
    "h2tune_joint": Row("h2tune", {**COMMON, "alternation": "joint"}),
    "h2tune_seeded": Row("h2tune", {**COMMON, "basis": "seeded"}),
}
EVERY_ROW = tuple(ROWS)

MODELS = {
    "minilm6": {"source": "minilm"},
    "minilm4": {"source": "minilm", "prune": {"layers": [0, 1, 3, 5]}},
    "minilm3": {"source": "minilm", "prune": {"layers": [0, 2, 5]}},
}
TASKS = {
    "trec": {"data": "trec", "max_length": 20},
    "sarcasm": {"data": "sarcasm", "max_length": 24},
    "reviews": {"data": "rotten_tomatoes", "max_length": 32},
}
EXAMPLES, VALIDATION, TEST = 64, 200, 500
BUDGET = {"batch_size": 16, "steps": 8}


def clients(model: str, task: str, count: int) -> dict[str, Any]:
    """Describe the clients of one model and one task."""
    return {
        "name": f"{model}-{task}",
        "count": count,
        "rank": 8,
        "targets": ["q", "v", "up", "down"],
        "model": MODELS[model],
        "task": {**TASKS[task], "train": EXAMPLES, "validation": VALIDATION, "test": TEST},
        "budget": BUDGET,
    }


# Public texts of another kind for methods that fit models to each other.
PROBE = {"data": "sarcasm", "count": 64, "max_length": 24}

SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "models",
            "One task on three models",
            "TREC on MiniLM with 6, 4 and 3 of its layers, two clients each.",
            tuple(clients(model, "trec", 2) for model in MODELS),
            EVERY_ROW,
            probe=PROBE,
        ),
        Setting(
            "tasks",
            "Three tasks on one model",
            "TREC, sarcasm and film reviews on MiniLM with 4 of its layers, two clients each.",
            tuple(clients("minilm4", task, 2) for task in TASKS),
            EVERY_ROW,
            probe=PROBE,
        ),
        Setting(
            "both",
            "Three tasks on three models",
            "Every model with every task, one client each: nobody else has a client's model and task.",
            tuple(clients(model, task, 1) for model in MODELS for task in TASKS),
            EVERY_ROW,
            probe=PROBE,
        ),
    )
}


def smoke(folder: Path) -> dict[str, Setting]:
    """Return a setting of a tiny random model, whose data it writes into a folder."""
    words = {"fruit": ("apple", "plum", "pear"), "tool": ("saw", "axe", "file")}
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"text": " ".join(rng.choice(words[label], 2)), "label": label})
        for label in words
        for _ in range(60)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "words.jsonl"
    data.write_text("\n".join(lines))
    shape = {"family": "bert", "width": 8, "layers": 2, "heads": 2, "mlp_width": 12}
    group = {
        "name": "tiny-words",
        "count": 2,
        "rank": 2,
        "targets": ["q", "up"],
        "model": {
            "source": "random",
            "tokenizer": "bytes",
            "pooling": "mean",
            "shape": {**shape, "max_positions": 16},
        },
        "task": {"data": str(data), "train": 8, "validation": 8, "test": 8, "max_length": 12},
        "budget": {"batch_size": 4, "steps": 1},
    }
    tiny = Setting(
        "smoke", "A tiny random model", "Nothing can be learnt from it.", (group,),
        ("local", "fedit", "h2tune"), rounds=2, seeds=(0, 1), grid_seeds=(100,),
    )  # fmt: skip
    return {tiny.name: tiny}

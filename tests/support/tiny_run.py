"""A federation that a config describes, builds and trains in seconds: random tiny models, own data."""

import json

import numpy as np

from h2tune_jax.run.config import RunConfig, parse_config
from h2tune_jax.run.federation import Federation, build_federation

WORDS = {
    "fruit": ("apple", "plum", "pear", "fig", "lime"),
    "tool": ("saw", "axe", "file", "drill", "plane"),
    "beast": ("cat", "ox", "hen", "dog", "ewe"),
}

TOML = """
name = "tiny"
seed = 3
rounds = 3

[method]
name = "h2tune"
learning_rate = 1e-2
lambda_norm = 1e-3

[log]
display = false

[evaluation]
batch_size = 8

[[groups]]
name = "narrow"
count = 2
rank = 2
targets = ["q", "up"]
[groups.model]
source = "random"
tokenizer = "bytes"
pooling = "mean"
shape = { family = "bert", width = 8, layers = 2, heads = 2, mlp_width = 12, max_positions = 16 }
[groups.task]
data = "words.jsonl"
train = 12
validation = 6
test = 8
max_length = 12
[groups.budget]
batch_size = 4

[[groups]]
name = "wide"
count = 3
rank = 4
targets = ["q"]
[groups.model]
source = "random"
tokenizer = "bytes"
pooling = "mean"
shape = { family = "bert", width = 12, layers = 3, heads = 2, mlp_width = 12, max_positions = 16 }
[groups.task]
data = "parity.jsonl"
train = 8
validation = 6
test = 8
max_length = 12
[groups.budget]
batch_size = 4
"""


def write_data(folder, seed=0):
    """Write the two data sets: which kind of thing a word names, and whether a word is long."""
    rng = np.random.default_rng(seed)
    kinds = [kind for kind, words in WORDS.items() for _ in words]
    words = [word for members in WORDS.values() for word in members]
    with (folder / "words.jsonl").open("w") as file:
        for i in rng.permutation(120):
            row = {"text": f"{words[i % 15]} {i}", "label": kinds[i % 15], "writer": f"w{i % 7}"}
            file.write(json.dumps(row) + "\n")
    with (folder / "parity.jsonl").open("w") as file:
        for i in rng.permutation(120):
            row = {"text": f"{words[i % 15]} {i}", "label": "odd" if i % 2 else "even"}
            file.write(json.dumps(row) + "\n")


def write_run(folder, text=TOML):
    """Write config and data into a folder; -> the config file."""
    write_data(folder)
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def tiny_config(folder, *overrides: str) -> RunConfig:
    """The config, with its data in `folder` (written where missing), changed by "key=value"."""
    if not (folder / "words.jsonl").is_file():
        write_data(folder)
    return parse_config(TOML, overrides, folder=folder)


def tiny_federation(folder, *overrides: str) -> Federation:
    """Build the federation of that config."""
    return build_federation(tiny_config(folder, *overrides))

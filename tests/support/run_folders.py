"""Run folders written by hand, in the formats that the loop writes."""

import contextlib
import json
import subprocess

import numpy as np
import pytest

GROUPS = (
    ("minilm", "trec", 0.24, 2, 8),
    ("short", "sarcasm", 0.54, 2, 4),
    ("smol", "movies", 0.5, 3, 8),
)


def write_run(
    folder,
    *,
    method="h2tune",
    seed=0,
    rounds=6,
    groups=GROUPS,
    gain=0.3,
    name="demo",
    moments=("trained",),
    known=True,
):
    """Write config.toml, run.json, metrics.jsonl and timings.jsonl; accuracies rise by `gain`."""
    folder.mkdir(parents=True)
    lines = [f'name = "{name}"', f"seed = {seed}", f"rounds = {rounds}"]
    lines += ["[method]", f'name = "{method}"']
    for group, task, _, count, rank in groups:
        lines += ["[[groups]]", f'name = "{group}"', f"count = {count}", f"rank = {rank}"]
        lines += ["[groups.task]", f'data = "{task}"']
    (folder / "config.toml").write_text("\n".join(lines) + "\n")
    info = {
        "format": 1,
        "seed": seed,
        "commit": "abc",
        "device": "cpu",
        "versions": {"jax": "0.10.2"},
    }
    if known:
        info["groups"] = [
            {"name": group, "task": task, "majority": majority, "num_clients": count}
            for group, task, majority, count, _ in groups
        ]
    (folder / "run.json").write_text(json.dumps(info))

    rng = np.random.default_rng([seed, len(method)])
    records, timings = [], []
    for index in range(rounds):
        cohorts, evaluation = {}, {moment: {} for moment in moments}
        for group, _, majority, count, _ in groups:
            noise = rng.normal(size=count)
            reached = majority + gain * (1 - 0.7 ** (index + 1)) + 0.02 * noise
            cohorts[group] = {
                "clients": list(range(count)),
                "loss": (1.5 * 0.8**index + 0.02 * noise).tolist(),
                "accuracy": reached.tolist(),
                "rejected": 0,
            }
            for moment in moments:
                evaluation[moment][group] = {
                    "accuracy": reached.tolist(),
                    "loss": (1.4 * 0.8**index + 0.02 * noise).tolist(),
                }
        records.append({
            "round": index, "cohorts": cohorts, "server": {},
            "bytes_up": 0 if method == "local" else 123_456 + 100 * index,
            "bytes_down": 0 if method == "local" else 234_567,
            "evaluation": evaluation,
        })  # fmt: skip
        seconds = (9.0 if index == 0 else 2.0) + 0.1 * float(rng.uniform())
        timings.append({
            "round": index, "seconds": seconds, "clients_per_second": 7 / seconds, "wall": 1.7e9 + index,
        })  # fmt: skip
    for file, lines in (("metrics.jsonl", records), ("timings.jsonl", timings)):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def save_arrays(folder, arrays, step=6):
    """Save a checkpoint of these arrays in a run's folder."""
    from h2tune_jax.run import write_checkpoint
    from h2tune_jax.run.folder import RunFolder

    write_checkpoint.save(RunFolder(folder), step, arrays, {})


def lora_arrays(groups=GROUPS, seed=0):
    """A checkpoint's arrays as a plain LoRA would hold them; the first and the last group are alike."""
    rng = np.random.default_rng(seed)
    out = {}
    for place, (_, _, _, count, rank) in enumerate(groups):
        width = 10 if place % 3 == 1 else 12
        for name, shape in (("a", (width, rank)), ("b", (rank, width))):
            leaf = rng.normal(size=(count, 4, *shape)).astype(np.float32)
            out[f".clients[{place}].params['{name}']['q']"] = leaf
    return out


def h2tune_arrays(groups=GROUPS, slots=6, size=8, seed=0):
    """A checkpoint's arrays as H2Tune would hold them, with groups of different depths and kinds."""
    rng = np.random.default_rng(seed)
    out = {}
    for place, (_, _, _, count, rank) in enumerate(groups):
        layers = (6, 3, 5)[place % 3]
        kinds = (("q", "v"), ("q",), ("q", "v", "up"))[place % 3]
        at = f".clients[{place}]"
        relation = np.zeros((count, slots, layers), np.float32)
        for layer in range(layers):
            relation[:, round(layer * (slots - 1) / max(layers - 1, 1)), layer] = 1
        if place % 3 == 2:
            relation += 0.2 * rng.normal(size=relation.shape).astype(np.float32)
        out[f"{at}.relation"] = relation
        rows = np.sort(rng.permutation(size)[:rank])
        index = (rows[:, None] * size + rows).ravel().astype(np.int32)
        out[f"{at}.active"] = np.broadcast_to(
            index, (count, layers, len(kinds), rank * rank)
        ).copy()
        middle = rng.normal(size=(count, layers, len(kinds), size, size)).astype(np.float32)
        out[f"{at}.middle"] = middle + middle[:1]
        out[f"{at}.trained"] = np.ones(count, bool)
        for kind in kinds:
            out[f"{at}.a['{kind}']"] = rng.normal(size=(count, layers, 12, rank)).astype(np.float32)
            out[f"{at}.b['{kind}']"] = rng.normal(size=(count, layers, rank, 12)).astype(np.float32)
    return out


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of its own, of so many bytes ("600k"), at a path; skips where there can be none."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path):
    """Write until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))

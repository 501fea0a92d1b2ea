"""Who gets which rows of the data that a config names."""

import json

import numpy as np
import pytest
import tiny_run
from tiny_run import tiny_federation

from h2tune_jax import tasks
from h2tune_jax.run.byte_tokenizer import ByteTokenizer
from h2tune_jax.run.federation import build_federation, client_weights, find_client
from h2tune_jax.types import FederationError


def texts_of(data, client):
    """The texts of a client's rows, read back from their bytes."""
    ids = data.examples["input_ids"][client, : data.num_examples[client]]
    return [ByteTokenizer().decode(row) for row in ids]


def test_rows_are_dealt_out_once(folder):
    federation = tiny_federation(folder)
    for group, train, test, validation in zip(
        federation.groups, federation.train, federation.test, federation.validation
    ):
        assert validation is not None
        clients = [set(texts_of(train, i)) for i in range(len(group.client_names))]
        held = set(texts_of(test, 0)), set(texts_of(validation, 0))
        assert [len(rows) for rows in (*clients, *held)] == [*train.num_examples, 8, 6]
        union = set.union(*clients, *held)
        assert len(union) == sum(map(len, (*clients, *held)))  # nobody shares a row


def test_labels_stand_by_their_texts(folder):
    rows = [json.loads(line) for line in (folder / "words.jsonl").read_text().splitlines()]
    known = {row["text"]: row["label"] for row in rows}
    federation = tiny_federation(
        folder, "groups.narrow.task.max_length=32", "groups.narrow.model.shape.max_positions=32"
    )
    for data in (federation.train[0], federation.test[0]):
        labels = [federation.groups[0].labels[i] for i in data.examples["labels"][1]]
        assert labels == [known[text] for text in texts_of(data, 1)]


def test_majority_is_that_of_the_test_rows(folder):
    federation = tiny_federation(folder)
    labels = federation.test[0].examples["labels"][0]
    assert federation.groups[0].majority == max(np.bincount(labels)) / 8


def test_shared_test_rows_are_one_copy(folder):
    data = tiny_federation(folder, "groups.wide.count=50", "groups.wide.task.train=1").test[1]
    ids = data.examples["input_ids"]
    assert ids.shape[0] == 50
    assert ids.strides[0] == 0
    assert all(texts_of(data, i) == texts_of(data, 0) for i in (1, 49))


def test_data_is_a_function_of_config_and_seed(folder, tmp_path):
    # The file's order does not matter.
    for name in ("words.jsonl", "parity.jsonl"):
        lines = (folder / name).read_text().splitlines()
        (tmp_path / name).write_text("\n".join(reversed(lines)) + "\n")
    one, shuffled, other = (
        tiny_federation(folder),
        tiny_federation(tmp_path),
        tiny_federation(folder, "seed=4"),
    )
    assert texts_of(one.train[0], 1) == texts_of(shuffled.train[0], 1)
    assert set(texts_of(one.train[0], 1)) != set(texts_of(other.train[0], 1))


def test_groups_on_the_same_data(folder):
    override = f"groups.wide.task.data={folder / 'words.jsonl'}"
    federation = tiny_federation(folder, override, "groups.wide.task.test=5")
    narrow, wide = federation.train
    ours = {text for i in range(2) for text in texts_of(narrow, i)}
    theirs = {text for i in range(3) for text in texts_of(wide, i)}
    assert not ours & theirs
    tests = [set(texts_of(data, 0)) for data in federation.test]
    assert tests[1] < tests[0]  # the same rows are held out from all
    assert not (ours | theirs) & tests[0]


def by_two_templates(folder):
    """Two groups on rows that both of them read as equal in part, each in its own way.

    Of every four rows `narrow` reads the first two as equal and the last two, `wide` the middle two:
    they are one by way of each other.
    """
    rows = [
        {
            "text": f"t{i // 4}.{i % 4 // 2}",
            "topic": f"p{i // 4}.{(i % 4 + 1) // 2}",
            "label": "ab"[i % 2],
        }
        for i in range(80)
    ]
    (folder / "read.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tiny_run.tiny_config(
        folder, f"groups.*.task.data={folder / 'read.jsonl'}", "groups.wide.task.text={topic}"
    )


def quartets(data):
    """Which quartets of rows the clients' texts come from."""
    texts = [text for i in range(len(data.num_examples)) for text in texts_of(data, i)]
    return {text[1:].split(".")[0] for text in texts}


def test_what_one_group_reads_as_equal_is_together_for_all(folder):
    federation = build_federation(by_two_templates(folder))
    trained = [quartets(data) for data in federation.train]
    held = quartets(federation.test[0]), quartets(federation.validation[0])
    assert held == (quartets(federation.test[1]), quartets(federation.validation[1]))
    parts = [*trained, *held]
    assert len(set.union(*parts)) == sum(map(len, parts))  # no quartet is in two of them


@pytest.mark.parametrize("how", ["groups", "rows"])
def test_readings_are_split_alike_in_any_order(folder, how):
    config = by_two_templates(folder)
    one = build_federation(config)
    if how == "groups":
        other = build_federation(config.model_copy(update={"groups": config.groups[::-1]}))
        found = [part[::-1] for part in (other.train, other.validation, other.test)]
    else:
        path = folder / "read.jsonl"
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
        other = build_federation(config)
        found = [other.train, other.validation, other.test]
    for part, again in zip((one.train, one.validation, one.test), found):
        for data, same in zip(part, again):
            np.testing.assert_array_equal(data.examples["input_ids"], same.examples["input_ids"])


def test_groups_that_read_alike_are_split_by_what_they_read(folder):
    """The digest that results on the disk were made with."""
    rows = [json.loads(line) for line in (folder / "words.jsonl").read_text().splitlines()]
    federation = tiny_federation(folder, f"groups.wide.task.data={folder / 'words.jsonl'}")
    sizes = {"test": 8, "validation": 6, "narrow": 24, "wide": 24}
    parts = tasks.split_rows(rows, sizes, seed=3, by=lambda row: [row["text"]])
    assert texts_of(federation.test[1], 2) == [rows[i]["text"] for i in parts["test"]]
    for name, data in zip(("narrow", "wide"), federation.train):
        own = [text for i in range(len(data.num_examples)) for text in texts_of(data, i)]
        assert sorted(own) == sorted(rows[i]["text"] for i in parts[name])


def test_draw_lets_clients_share_rows(folder):
    federation = tiny_federation(
        folder, "groups.narrow.count=20", "groups.narrow.task.train=30",
        "groups.narrow.task.partition.kind=draw",
    )  # fmt: skip
    rows = [set(texts_of(federation.train[0], i)) for i in range(20)]
    assert {len(own) for own in rows} == {30}
    assert len(set.union(*rows)) <= 120 - 8 - 6
    assert len({frozenset(own) for own in rows}) == 20
    assert not set.union(*rows) & set(texts_of(federation.test[0], 0))
    # Who else there is does not matter.
    fewer = tiny_federation(
        folder, "groups.narrow.count=3", "groups.narrow.task.train=30",
        "groups.narrow.task.partition.kind=draw",
    )  # fmt: skip
    assert [set(texts_of(fewer.train[0], i)) for i in range(3)] == rows[:3]


def test_dirichlet_and_pathological(folder):
    skewed = tiny_federation(folder, "groups.narrow.task.partition={kind='dirichlet', alpha=0.3}")
    counts = skewed.train[0].num_examples
    assert counts.sum() == 24
    assert counts[0] != counts[1]
    # Rows beyond a client's own repeat its first.
    short = int(np.argmin(counts))
    ids = skewed.train[0].examples["input_ids"][short]
    assert np.all(ids[counts[short] :] == ids[0])
    one_class = tiny_federation(
        folder, "groups.wide.task.partition={kind='pathological', classes=1}"
    )
    labels = one_class.train[1].examples["labels"]
    assert all(
        len(set(labels[i, : one_class.train[1].num_examples[i]].tolist())) == 1 for i in range(3)
    )


def test_by_key_makes_a_client_of_each_writer(folder):
    rows = [json.loads(line) for line in (folder / "words.jsonl").read_text().splitlines()]
    writers = {row["text"]: row["writer"] for row in rows}
    changes = (
        "groups.narrow.task.partition={kind='by_key', key='writer'}", "groups.narrow.count=3",
        "groups.narrow.task.train=10", "groups.narrow.task.max_length=32",
        "groups.narrow.model.shape.max_positions=32",
    )  # fmt: skip
    train = tiny_federation(folder, *changes).train[0]
    for client in range(3):
        assert {writers[text] for text in texts_of(train, client)} == {f"w{client}"}
        assert train.num_examples[client] <= 10


def test_own_test_rows(folder):
    changes = ("groups.narrow.task.held_out=own", "groups.narrow.task.test=4")
    federation = tiny_federation(folder, *changes)
    train, test, validation = federation.train[0], federation.test[0], federation.validation[0]
    assert train.num_examples.tolist() == [12, 12]
    assert test.num_examples.tolist() == [4, 4]
    assert validation is not None
    assert validation.num_examples.tolist() == [6, 6]
    parts = [set(texts_of(data, i)) for data in (train, test, validation) for i in range(2)]
    assert len(set.union(*parts)) == 2 * (12 + 4 + 6)


def test_a_clients_repeats_stay_in_one_part(folder, tmp_path):
    lines = (folder / "words.jsonl").read_text().splitlines(keepends=True)
    thrice = tmp_path / "thrice.jsonl"
    thrice.write_text("".join(line * 3 for line in lines))
    changes = (
        f"groups.narrow.task.data={thrice}", "groups.narrow.task.held_out=own",
        "groups.narrow.task.test=6", "groups.narrow.task.train=60",
    )  # fmt: skip
    federation = tiny_federation(folder, *changes)
    all_parts = federation.train[0], federation.test[0], federation.validation[0]
    for client in range(2):
        train, test, validation = (set(texts_of(data, client)) for data in all_parts)
        assert train
        assert test
        assert validation
        assert not train & test
        assert not (train | test) & validation


def test_all_that_is_left(folder):
    data = tiny_federation(folder, "groups.narrow.task.train=none").train[0]
    assert data.num_examples.tolist() == [53, 53]  # 120 less 8 and 6


def test_weights_by_examples(folder):
    config = tiny_run.tiny_config(folder, "groups.wide.weight=examples", "groups.narrow.weight=2")
    narrow, wide = client_weights(config, build_federation(config))
    assert narrow.tolist() == [2, 2]
    assert wide.tolist() == [8, 8, 8]
    assert wide.dtype == np.float32


def test_clients_by_name(folder):
    federation = tiny_federation(folder)
    assert find_client(federation, "wide/2") == (1, 2)
    with pytest.raises(FederationError, match=r"no client is called 'wide/3'.*did you mean 'wide/"):
        find_client(federation, "wide/3")


def test_probe_is_the_same_texts_for_all(folder):
    changes = [f"probe.data={folder / 'parity.jsonl'}", "probe.count=5", "probe.max_length=16"]
    federation = tiny_federation(folder, *changes, "method.relation=cka")
    assert federation.probe is not None
    one, other = federation.probe
    assert one["input_ids"].shape == (5, 16)
    np.testing.assert_array_equal(one["input_ids"], other["input_ids"])
    assert tiny_federation(folder).probe is None

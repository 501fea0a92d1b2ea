import logging

import numpy as np
import pytest
from words import Words

from h2tune_jax.tasks import encoding
from h2tune_jax.types import FederationError


def same(found, expected):
    np.testing.assert_array_equal(found, expected)


def test_texts_are_padded_and_cut_and_the_cut_is_counted():
    rows = [{"text": "a b"}, {"text": "a b c d e f"}, {"text": "a b c"}]
    found = encoding.encode_texts(rows, Words(), max_length=4)
    same(found.examples["input_ids"], [[1, 10, 11, 0], [1, 10, 11, 12], [1, 10, 11, 12]])
    same(found.examples["lengths"], [3, 4, 4])
    same(found.examples["attention_mask"], [[1, 1, 1, 0], [1] * 4, [1] * 4])
    assert (found.num_truncated, found.num_lost_tokens, found.num_texts) == (1, 3, 3)
    assert {k: v.dtype.name for k, v in found.examples.items()} == {
        "input_ids": "int32",
        "attention_mask": "bool",
        "lengths": "int32",
    }


def test_pairs_carry_their_types():
    rows = [{"q": "a", "s": "b c"}, {"q": "a a", "s": "b c d"}]
    found = encoding.encode_texts(rows, Words(), max_length=5, text="{q}", pair="{s}")
    same(found.examples["input_ids"], [[1, 10, 3, 11, 12], [1, 10, 10, 3, 11]])
    same(found.examples["token_type_ids"], [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    assert (found.num_truncated, found.num_lost_tokens) == (1, 2)


def test_answers_follow_prompts_and_are_masked_in():
    rows = [{"prompt": "a b", "answer": "x"}, {"prompt": "a", "answer": "x y"}]
    found = encoding.encode_answers(rows, Words(), max_length=6)
    same(found.examples["input_ids"], [[1, 10, 11, 12, 2, 0], [1, 10, 12, 13, 2, 0]])
    same(found.examples["answer_mask"], [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0]])
    same(found.examples["lengths"], [5, 5])
    assert found.num_truncated == 0
    assert found.examples["answer_mask"].dtype == bool


def test_a_long_row_loses_the_start_of_its_prompt_then_the_end_of_its_answer():
    rows = [{"prompt": "a b c d", "answer": "x y"}, {"prompt": "a b", "answer": "x y z u v"}]
    found = encoding.encode_answers(rows, Words(), max_length=5)
    # The beginning stays, then d; the second row keeps one token of its prompt and no end token.
    same(found.examples["input_ids"], [[1, 13, 14, 15, 2], [11, 14, 15, 16, 17]])
    same(found.examples["answer_mask"], [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    assert (found.num_truncated, found.num_lost_tokens) == (2, (5 + 3 - 5) + (3 + 6 - 5))
    plain = encoding.encode_answers(rows[:1], Words(begin=False), max_length=5)
    same(plain.examples["input_ids"], [[12, 13, 14, 15, 2]])


def test_prompts_keep_their_end():
    rows = [{"prompt": "a b c d e"}, {"prompt": "a"}]
    found = encoding.encode_prompts(rows, Words(), max_length=4)
    same(found.examples["input_ids"], [[1, 12, 13, 14], [1, 10, 0, 0]])
    assert (found.num_truncated, found.num_lost_tokens) == (1, 2)


def test_choices_stand_behind_their_prompt():
    rows = [
        {"prompt": "q", "choices": ["x", "y y"], "label": "B"},
        {"prompt": "q q", "choices": ["x", "y", "z"], "label": "C"},
    ]
    found = encoding.encode_choices(rows, Words(), max_length=5, label_names="ABC")
    examples = found.examples
    q, x, y, z = 10, 11, 12, 13
    same(examples["input_ids"][0], [[1, q, x, 0, 0], [1, q, y, y, 0], [1, q, x, 0, 0]])
    same(examples["input_ids"][1], [[1, q, q, x, 0], [1, q, q, y, 0], [1, q, q, z, 0]])
    # The third choice of the first row fills up: a real text, but no answer.
    same(examples["answer_mask"][0], [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0] * 5])
    same(examples["lengths"], [[3, 4, 3], [4, 4, 4]])
    same(examples["labels"], [1, 2])
    numbered = encoding.encode_choices(
        [{"prompt": "q", "o": "x|y", "right": 1}],
        Words(),
        max_length=5,
        choices=lambda row: row["o"].split("|"),
        field="right",
    )
    same(numbered.examples["labels"], [1])
    assert (found.num_truncated, found.num_texts) == (0, 5)


def test_choices_that_the_cut_makes_one_are_refused():
    """Nobody could tell which of the two is right."""
    row = {"prompt": "q", "choices": ["a b c d", "a b c x"], "label": 1}
    call = lambda *rows, width: encoding.encode_choices(
        rows, Words(), max_length=width, where="group 'one'"
    )
    kept = call(row, width=5)  # one token of the prompt, and all of the answers
    assert (kept.num_truncated, kept.num_texts) == (2, 2)
    plain = {"prompt": "q", "choices": ["a", "b"], "label": 0}
    message = "group 'one', row 1: two choices of 'q' are one once they are cut to 4 tokens"
    with pytest.raises(FederationError, match=f"{message}; raise max_length"):
        call(plain, row, width=4)
    longer = {**row, "prompt": "word " * 40}
    with pytest.raises(FederationError, match=r"of 'word [word ]{72}\.\.\.' are one"):
        call(longer, width=4)
    # One choice that ends where the other is cut.
    with pytest.raises(FederationError, match="two choices of 'q'"):
        call({**row, "choices": ["a b c", "a b c d"]}, width=4)


def test_choices_that_were_one_before_are_taken_as_they_are():
    """A slip of the data, not of the settings; equal answers of other rows are none at all."""
    same_twice = {"prompt": "q", "choices": ["a b c d", "a b c d"], "label": 1}
    other = {"prompt": "q", "choices": ["a b c x", "e"], "label": 1}
    found = encoding.encode_choices([same_twice, other], Words(), max_length=4)
    same(found.examples["input_ids"][0, 0], found.examples["input_ids"][0, 1])
    same(found.examples["input_ids"][0, 0], found.examples["input_ids"][1, 0])


def test_labels_and_targets():
    rows = [{"label": "b", "target": "1.5"}, {"label": "a", "target": -2}]
    same(encoding.encode_labels(rows, ["a", "b"]), [1, 0])
    same(encoding.encode_targets(rows), [1.5, -2])
    same(encoding.encode_labels([{"y": 1}, {"y": "0"}], [0, 1], field="y"), [1, 0])
    assert encoding.encode_labels(rows, ["a", "b"]).dtype == np.int32
    assert encoding.encode_targets(rows).dtype == np.float32


def test_templates():
    row = {"a": "{b}", "b": 1}
    assert encoding.fill_template("{a} and {b}: {{}}", row) == "{b} and 1: {}"
    assert encoding.fill_template(lambda r: f"<{r['b']}>", row) == "<1>"
    with pytest.raises(FederationError, match=r"here: .*'text'; allowed: a, b"):
        encoding.fill_template("{text}", row, where="here")
    # No way from a template into Python's objects.
    with pytest.raises(FederationError, match="__class__"):
        encoding.fill_template("{a.__class__}", row)


ONE = [{"prompt": "p", "answer": "a", "choices": ["x"], "label": 0}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: encoding.encode_labels(
                [{"label": "a"}, {"label": "c"}], ["a", "b"], where="client 'ann'"
            ),
            r"client 'ann', row 1: field 'label' has the value 'c', which is outside the label set",
        ),
        (lambda: encoding.encode_labels([], ["a", "a"]), "twice"),
        (
            lambda: encoding.encode_targets([{"target": "nan"}], where="client 3"),
            "client 3, row 0: field 'target' has the value 'nan', not a finite number",
        ),
        (lambda: encoding.encode_targets([{"target": None}]), "None, not a finite number"),
        (
            lambda: encoding.encode_texts([{"text": " "}], Words(begin=False), max_length=4),
            "data, row 0: the text has no tokens",
        ),
        (
            lambda: encoding.encode_answers(
                [{"prompt": "", "answer": "a"}], Words(begin=False), max_length=4
            ),
            "row 0: the prompt has no tokens",
        ),
        (
            lambda: encoding.encode_choices(
                [ONE[0], {"prompt": "p", "choices": ["x", ""], "label": 0}], Words(), max_length=4
            ),
            "row 1: the answer has no tokens",
        ),
        (lambda: encoding.encode_answers(ONE, Words(), max_length=1), "max_length must be"),
        (
            lambda: encoding.encode_choices(
                [*ONE, ONE[0] | {"choices": ["x", "y"]}, ONE[0] | {"label": 1}],
                Words(),
                max_length=4,
            ),
            "row 2: field 'label' names choice '1' of 1",
        ),
        (lambda: encoding.encode_choices([{}], Words(), max_length=4), "'choices'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(FederationError, match=message):
        call()


def test_a_real_tokenizer_keeps_its_special_tokens(minilm_tokenizer):
    rows = [{"text": "Who wrote it ?"}, {"text": "word " * 60}]
    found = encoding.encode_texts(rows, minilm_tokenizer, max_length=16)
    ids, lengths = found.examples["input_ids"], found.examples["lengths"]
    expected = minilm_tokenizer(rows[0]["text"])["input_ids"]
    same(ids[0, : lengths[0]], expected)
    same(ids[0, lengths[0] :], minilm_tokenizer.pad_token_id)
    assert lengths.tolist() == [len(expected), 16]
    assert ids[1, 0] == minilm_tokenizer.cls_token_id
    assert ids[1, 15] == minilm_tokenizer.sep_token_id
    assert (found.num_truncated, found.num_lost_tokens) == (1, 62 - 16)
    pairs = encoding.encode_texts(
        [{"a": "one two", "b": "three"}], minilm_tokenizer, max_length=8, text="{a}", pair="{b}"
    )
    same(pairs.examples["token_type_ids"], [[0, 0, 0, 0, 1, 1, 0, 0]])


def test_a_cut_text_brings_no_warning_of_errors_to_come(minilm_tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    long = [{"text": "word " * (minilm_tokenizer.model_max_length + 1)}]
    assert encoding.encode_texts(long, minilm_tokenizer, max_length=16).num_truncated == 1
    assert not caplog.records

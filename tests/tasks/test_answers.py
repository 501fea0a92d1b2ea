import math
import time
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2tune_jax.tasks.answers import (
    decode_tokens,
    exact_match,
    extract_answer,
    matches,
    normalise_number,
)
from h2tune_jax.types import FederationError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", "5"),
        ("5.0", "5"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("$1,234.50", "2469/2"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("50%", "50"),
        ("12.", "12"),
        (".5", "1/2"),
        ("0.5", "1/2"),
        ("2/4", "1/2"),
        ("1e3", "1000"),
        ("-0", "0"),
        ("1/0", None),
        ("1,2", None),
        ("five", None),
        ("", None),
        ("1e9999", None),
        ("9" * 300, None),
    ],
)
def test_normal_form_of_numbers(text, value):
    assert normalise_number(text) == value


@given(st.fractions(max_denominator=1000), st.integers(0, 10**9))
def test_normal_form_keeps_the_value(fraction, whole):
    assert normalise_number(str(fraction)) == str(fraction)
    assert normalise_number(f"${whole:,}.00") == str(whole)


@pytest.mark.parametrize(
    ("form", "text", "answer"),
    [
        ("number", "He pays 3 + 4 = 7.\nThe answer is 7.", "7"),
        ("number", "The answer is 5 apples, not 6", "5"),
        ("number", "First the answer is 1. No: the answer is 2", "2"),
        ("number", "so 20 - 5 = 15 in all", "15"),
        ("number", "it is 7-3", "3"),
        ("number", "#### 1,200", "1200"),
        ("number", "The final answer is: $2.50.", "5/2"),
        ("number", "The answer is\n8", "8"),
        ("number", "After 3 tries the answer is unknown", None),
        ("number", "no idea", None),
        ("choice", "Let's think about it.\nThe answer is B.", "B"),
        ("choice", "The answer is (C) 12", "C"),
        ("choice", "the answer is: D", "D"),
        ("choice", "(E)", "E"),
        ("choice", "B) 4 km", "B"),
        ("choice", "The answer is Both", None),
        ("choice", "A train leaves", None),
        ("program", "x = 2\nprint(x * 1.25)", "5/2"),
        ("program", "Here it is:\n```python\nprint(6)\n```\nDone.", "6"),
        ("program", "import os\nprint(1)", None),
        ("program", "The answer is 5", None),
        ("label", " Positive", "positive"),
        ("label", "Yes.\nBecause", "yes"),
        ("label", "\n no!", "no"),
        ("label", " ", None),
    ],
)
def test_extraction(form, text, answer):
    assert extract_answer(text, form) == answer


def test_exact_match_is_the_share_of_equal_answers():
    texts = ["The answer is 5.0", "The answer is 6", "none"]
    assert exact_match("number", texts, ["5", "5", "5"]) == pytest.approx(1 / 3)
    assert math.isnan(exact_match("number", [], []))
    with pytest.raises(FederationError, match="3 texts, but 1 targets"):
        exact_match("number", texts, ["5"])
    with pytest.raises(FederationError, match=r"'numbr'.*did you mean 'number'"):
        extract_answer("5", "numbr")


def test_programs_may_differ_by_rounding_only():
    target = extract_answer("print(0.3)", "program")
    assert target is not None
    assert matches("program", "print(0.1 + 0.2)", target)
    assert Fraction(target) != Fraction(0.1 + 0.2)
    assert not matches("program", "print(0.3001)", target)
    assert not matches("program", "print(1/0)", target)
    huge = extract_answer("print(7 ** 700)", "program")
    assert huge is not None
    assert matches("program", "print(7 ** 700)", huge)
    assert not matches("program", "print(7 ** 700 + 1)", huge)


@pytest.mark.parametrize("form", ["number", "choice", "program", "label"])
@pytest.mark.parametrize("piece", [" ", "1,", "- ", "$ ", "the answer is ", "```", "(", "1 / "])
def test_long_texts_take_no_time(form, piece):
    start = time.perf_counter()
    extract_answer(piece * 4000, form)
    assert time.perf_counter() - start < 2


def test_generated_tokens_become_text(minilm_tokenizer):
    ids = minilm_tokenizer(["the answer is 12", "yes"])["input_ids"]
    tokens = np.zeros((2, 9), np.int32)
    for row, text in zip(tokens, ids):
        row[: len(text)] = text
        row[len(text) :] = minilm_tokenizer.convert_tokens_to_ids("no")
    texts = decode_tokens(minilm_tokenizer, jnp.asarray(tokens), jnp.array([len(t) for t in ids]))
    assert texts == ["the answer is 12", "yes"]
    assert matches("number", texts[0], "12")

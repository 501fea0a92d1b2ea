"""Score generated text: take the answer out of it, put it into a normal form, and compare.

Three forms of answer:

    number    a number in words of reasoning: "The answer is $1,234.50."   -> "2469/2"
    choice    a letter: "The answer is (B)."                               -> "B"
    program   a program, whose value is computed (see `programs`)          -> "2469/2"
    label     a word or a line, compared without case or punctuation       -> "positive"
"""

import math
import re
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from h2tune_jax.tasks.programs import ProgramError, evaluate_program
from h2tune_jax.types import FederationError, near_match

FORMS = ("number", "choice", "program", "label")

# Programs compute in floating point, by different routes: equal up to this much.
PROGRAM_TOLERANCE = 1e-6

# A minus sign after a digit or a bracket is a subtraction.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = (
    r"(?:[$£€]\s?)?(?:(?<![\w)])[-+\u2212])?(?:[$£€]\s?)?"
    rf"(?:{_DIGITS})(?:[eE][-+]?\d{{1,3}})?(?:\s*/\s*\d+)?"
)
_SAID = re.compile(r"(?:the\s+(?:final\s+)?answer\s+is|answer\s*:|####)\s*:?", re.IGNORECASE)
_LETTER_SAID = re.compile(r"\(?([A-Z])(?![A-Za-z])")
_LETTER_ALONE = re.compile(r"\(?([A-Z])(?:[).:].*)?", re.DOTALL)
_FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)(?:```|\Z)", re.DOTALL)


def normalise_number(text: str) -> str | None:
    """Return a number as an exact fraction in lowest terms, as text; None if it is no number.

    Currency signs, thousands' commas, a percent sign, and a full stop at the end are left out:
    "$1,234.50" and "1234.5" are both "2469/2", and "50%" is "50".
    """
    cleaned = text.strip().rstrip(".%").rstrip()
    if len(cleaned) > 200 or not re.fullmatch(_NUMBER, cleaned):
        return None
    cleaned = re.sub(r"[\s,$£€+]", "", cleaned.replace("\u2212", "-"))
    top, _, bottom = cleaned.partition("/")
    if bottom and int(bottom) == 0:
        return None
    return str(Fraction(top) / int(bottom or 1))


def extract_answer(text: str, form: str) -> str | None:
    """Take the answer out of a text, in its normal form; None if there is none.

    A number or a choice is what follows the last "the answer is", "answer:" or "####"; a text that
    says none of these gives its last number, or the letter that it opens with.
    """
    if form not in FORMS:
        raise FederationError(f"no form of answer is called {form!r}; {near_match(form, FORMS)}")
    if form == "program":
        return _extract_value(text)
    if form == "label":
        first = next((line for line in text.splitlines() if line.strip()), "")
        return re.sub(r"[^\w\s]", " ", first).strip().lower() or None
    said = next(iter(deque(_SAID.finditer(text), maxlen=1)), None)
    # What is said ends with its line.
    rest = text if said is None else text[said.end() :].strip().partition("\n")[0]
    if form == "choice":
        found = _LETTER_ALONE.fullmatch(rest.strip()) if said is None else _LETTER_SAID.match(rest)
        return found[1] if found else None
    numbers = re.findall(_NUMBER, rest)
    if not numbers:
        return None
    return normalise_number(numbers[-1] if said is None else numbers[0])


def _extract_value(text: str) -> str | None:
    fenced = _FENCE.search(text)
    try:
        value = evaluate_program(fenced[1] if fenced else text)
    except ProgramError:
        return None
    return str(Fraction(value))


def matches(form: str, generated: str, target: str) -> bool:
    """Say whether a generated text gives the target, an answer in its normal form."""
    found = extract_answer(generated, form)
    if found is None:
        return False
    if form != "program":
        return found == target
    try:
        return math.isclose(
            Fraction(found), Fraction(target), rel_tol=PROGRAM_TOLERANCE, abs_tol=1e-12
        )
    except OverflowError:
        return Fraction(found) == Fraction(target)


def decode_tokens(
    tokenizer: Any,
    tokens: Any,  # i32[B, N]
    lengths: Any,  # i32[B]
) -> list[str]:
    """Turn generated tokens into texts, without special tokens and what follows a text's end."""
    rows = zip(np.asarray(tokens).tolist(), np.asarray(lengths).tolist())
    return [tokenizer.decode(ids[:length], skip_special_tokens=True) for ids, length in rows]


def exact_match(form: str, generated: Sequence[str], targets: Sequence[str]) -> float:
    """Return the share of generated texts that give their target; NaN for none at all."""
    if len(generated) != len(targets):
        raise FederationError(f"{len(generated)} texts, but {len(targets)} targets")
    hits = [matches(form, text, target) for text, target in zip(generated, targets)]
    return sum(hits) / len(hits) if hits else math.nan

"""The two suites of the paper, prepared from their original files.

D1, MathInstruct (one JSON file of 262,039 problems from 14 sources): fill-in-the-blank from
GSM8K-RFT, multiple choice from AQuA-RAT, programs from MathQA. D2, GLUE as generation, from its TSV
files: SST-2, QQP, WNLI; and QNLI, which the paper's public code prepares in WNLI's place.

Prepared rows have `task`, `prompt`, `answer` (the text to learn), `form` and `target` (the extracted
answer that generated text is scored by; see `answers`). As in that code, rows are taken in the
file's order, the training rows before the test rows (`cut_blocks`), and rows whose answer cannot be
extracted are left out; here they are counted. Programs are evaluated, never executed.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from h2tune_jax.tasks.answers import extract_answer
from h2tune_jax.tasks.encoding import fill_template
from h2tune_jax.tasks.reading import Row, read_rows, read_table
from h2tune_jax.types import FederationError, near_match


class Prepared(NamedTuple):
    """Rows of a suite, and how many were left out for which reason."""

    rows: list[Row]
    left_out: dict[str, int]


MATH_SOURCES = {
    "blank": ("data/CoT/gsm_rft.json", "number"),
    "choice": ("data/CoT/aqua_rat.json", "choice"),
    "program": ("data/PoT/mathqa.json", "program"),
}
"""Task of D1 -> (its `source` in MathInstruct, the form of its answer)."""

_SAID = re.compile(r"the answer is", re.IGNORECASE)
_OPTION = re.compile(r"\(([A-Z])\)\s*(.*?)\s*(?=\([A-Z]\)|\Z)", re.DOTALL)


def prepare_math(path: str | os.PathLike, task: str) -> Prepared:
    """Prepare one task of MathInstruct: "blank", "choice" or "program".

    Rows of "choice" also have `choices` and `label` for choice by likelihood, with their `prompt`
    unchanged, choices and all.
    """
    if task not in MATH_SOURCES:
        raise FederationError(f"no task of D1 is called {task!r}; {near_match(task, MATH_SOURCES)}")
    source, form = MATH_SOURCES[task]
    rows, left_out = [], Counter()
    for number, item in enumerate(read_rows(path)):
        for field in ("source", "instruction", "output"):
            if not isinstance(item.get(field), str):
                raise FederationError(f"{path}, row {number}: no text in the field {field!r}")
        if item["source"] != source:
            continue
        prompt, answer = item["instruction"], item["output"]
        # Only a stated answer counts: a last number in passing is none.
        said = form == "program" or _SAID.search(answer)
        target = extract_answer(answer, form) if said else None
        if target is None:
            left_out["no answer can be extracted"] += 1
            continue
        row = {"task": task, "prompt": prompt, "answer": answer, "form": form, "target": target}
        if task == "choice":
            options = dict(_OPTION.findall(prompt.rpartition("Answer Choices:")[2]))
            if target not in options:
                left_out["the answer is none of the choices"] += 1
                continue
            row |= {"choices": list(options.values()), "label": list(options).index(target)}
        rows.append(row)
    if not rows:
        raise FederationError(f"{path}: no usable row has the source {source!r}")
    return Prepared(rows, dict(left_out))


class GlueTask(NamedTuple):
    """How a task of GLUE is written as text."""

    prompt: str
    label_field: str
    answers: Mapping[str, str]  # by the file's label


GLUE_TASKS: Mapping[str, GlueTask] = {
    "sst2": GlueTask(
        "Is the mood of this film review positive or negative? Answer with Positive or Negative.\n"
        "Review: {sentence}\nAnswer:",
        "label",
        {"0": "Negative", "1": "Positive"},
    ),
    "qqp": GlueTask(
        "Do these two questions ask for the same thing? Answer with Yes or No.\n"
        "Question 1: {question1}\nQuestion 2: {question2}\nAnswer:",
        "is_duplicate",
        {"0": "No", "1": "Yes"},
    ),
    "wnli": GlueTask(
        "Does the second sentence follow from the first? Answer with Yes or No.\n"
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nAnswer:",
        "label",
        {"0": "No", "1": "Yes"},
    ),
    "qnli": GlueTask(
        "Does the sentence hold the answer to the question? Answer with Yes or No.\n"
        "Question: {question}\nSentence: {sentence}\nAnswer:",
        "label",
        {"not_entailment": "No", "entailment": "Yes"},
    ),
}
"""The tasks of D2."""


def prepare_glue(path: str | os.PathLike, task: str) -> Prepared:
    """Prepare a TSV file of GLUE, `train.tsv` or `dev.tsv`: "sst2", "qqp", "wnli" or "qnli".

    Lines with a wrong number of columns, of which QQP has some, are left out and counted. A file
    without labels, such as GLUE's `test.tsv`, is an error, as is a label that is not the task's.
    """
    if task not in GLUE_TASKS:
        raise FederationError(f"no task of D2 is called {task!r}; {near_match(task, GLUE_TASKS)}")
    form = GLUE_TASKS[task]
    rows = []
    items, ragged = _read_glue(Path(path))
    for number, item in enumerate(items):
        where = f"{path}, row {number}"
        if form.label_field not in item:
            raise FederationError(
                f"{where}: no field {form.label_field!r}: has this file labels? It has {list(item)}"
            )
        label = item[form.label_field]
        if label not in form.answers:
            raise FederationError(
                f"{where}: field {form.label_field!r} has the value {label!r}, which is outside the "
                f"label set; {near_match(label, form.answers)}"
            )
        answer = form.answers[label]
        rows.append(
            {
                "task": task,
                "prompt": fill_template(form.prompt, item, where=where),
                "answer": f" {answer}",
                "form": "label",
                "target": answer.lower(),
            }
        )
    return Prepared(rows, {"a wrong number of columns": len(ragged)} if ragged else {})


def _read_glue(path: Path) -> tuple[list[Row], list[tuple[int, int, int]]]:
    if path.suffix != ".tsv" or not path.is_file():
        raise FederationError(f"{path}: expected a .tsv file of GLUE")
    return read_table(path)


def cut_blocks(
    rows: Sequence[Row], *, train: int = 5_000, test: int = 500, num_blocks: int = 1
) -> tuple[dict[str, Sequence[Row]], ...]:
    """Cut rows, in their order, into blocks of training rows followed by test rows.

    The paper's heterogeneous federation has one block a task; its homogeneous ones have three blocks
    of one task. Too few rows are an error.
    """
    size = train + test
    if len(rows) < num_blocks * size:
        raise FederationError(
            f"{num_blocks} blocks of {train} + {test} rows are asked for, but there are {len(rows)}"
        )
    cut: Callable[[int], dict[str, Sequence[Row]]] = lambda start: {
        "train": rows[start : start + train],
        "test": rows[start + train : start + size],
    }
    return tuple(cut(block * size) for block in range(num_blocks))

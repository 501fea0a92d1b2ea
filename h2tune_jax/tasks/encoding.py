"""From rows to arrays of a fixed length: prompt templates, tokens, lengths, labels.

A tokenizer is any Hugging Face tokenizer, or a callable of the same form: called with a list of
texts it returns a mapping with `input_ids`. Tokens fill a row from the left; `lengths` says how
many there are, `attention_mask` says the same by position, and what follows is padding. A text that
is too long is cut, and counted. With T = `max_length`:

    input_ids       i32[n, T]
    attention_mask  bool[n, T]
    lengths         i32[n]
    token_type_ids  i32[n, T]   which text of a pair, where the tokenizer tells
    answer_mask     bool[n, T]  the tokens that the loss counts
    labels          i32[n]
"""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax.tasks.reading import Row, read_column
from h2tune_jax.types import FederationError, near_match

Template = str | Callable[[Row], str]
"""Text with {fields} of the row in it, or a function of the row."""

Examples = dict[str, np.ndarray]


class Encoded(NamedTuple):
    """Arrays, and what did not fit into them."""

    examples: Examples  # leaves [n, ...]
    num_truncated: int  # texts that were cut
    num_lost_tokens: int
    num_texts: int  # with a prompt, of every answer or choice behind it


def fill_template(template: Template, row: Row, *, where: str = "data") -> str:
    """Put a row's fields into a template. Braces in the fields' own text are left as they are."""
    if callable(template):
        return template(row)
    for _, field, _, _ in string.Formatter().parse(template):
        if field is not None and field not in row:
            raise FederationError(
                f"{where}: the template asks for the field {field!r}; {near_match(field, row)}"
            )
    return template.format_map(row)


def encode_labels(
    rows: Sequence[Row], label_names: Sequence[str], *, field: str = "label", where: str = "data"
) -> np.ndarray:  # i32[n]
    """Number the rows' labels by their place in `label_names`, as `number_labels` does.

    A label outside the label set is an error that names the client (`where`), the row, the field
    and the value.
    """
    column = read_column(rows, field, where=where)
    return number_labels(column, label_names, where=where, what=f"field {field!r} has the value")


def number_labels(
    labels: Sequence[Any] | np.ndarray,
    label_names: Sequence[str],
    *,
    where: str = "data",
    what: str = "the label",
) -> np.ndarray:  # i32[n]
    """Number labels by their place in `label_names`: the one rule for it.

    Labels are names and are compared as text, so 1 and "1" are the same. An array of integers holds
    what this function has made: numbers, from 0. `where` and `what` begin the error that names a label
    outside the label set.
    """
    names = [str(name) for name in label_names]
    if len(set(names)) != len(names):
        raise FederationError(f"{where}: a label name occurs twice in {list(label_names)}")
    known: Sequence[Any] = names
    if np.issubdtype(getattr(labels, "dtype", object), np.integer):
        known, labels, what = range(len(names)), np.asarray(labels).tolist(), f"{what} number"
    numbers = {str(label): i for i, label in enumerate(known)}
    found = np.empty(len(labels), np.int32)
    for i, label in enumerate(labels):
        if str(label) not in numbers:
            raise FederationError(
                f"{where}, row {i}: {what} {label!r}, which is outside the label set; "
                f"{near_match(str(label), names)}"
            )
        found[i] = numbers[str(label)]
    return found


def encode_targets(
    rows: Sequence[Row], *, field: str = "target", where: str = "data"
) -> np.ndarray:  # f32[n]
    """Read the rows' numbers for regression; what is no finite number is an error that names it."""
    targets = np.empty(len(rows), np.float32)
    for i, value in enumerate(read_column(rows, field, where=where)):
        try:
            targets[i] = float(value)
        except (TypeError, ValueError):
            targets[i] = np.nan
        if not np.isfinite(targets[i]):
            raise FederationError(
                f"{where}, row {i}: field {field!r} has the value {value!r}, not a finite number"
            )
    return targets


def encode_texts(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    text: Template = "{text}",
    pair: Template | None = None,
    where: str = "data",
) -> Encoded:
    """Tokenise a text a row, or a pair of texts, with the tokenizer's special tokens.

    Returns:
      `input_ids`, `attention_mask`, `lengths`; for pairs also `token_type_ids`. Long texts are cut
      as the tokenizer does it, which keeps its special tokens.
    """
    texts = [fill_template(text, row, where=where) for row in rows]
    pairs = None if pair is None else [fill_template(pair, row, where=where) for row in rows]
    found = _tokenise(tokenizer, texts, pairs)
    long = [i for i, ids in enumerate(found["input_ids"]) if len(ids) > max_length]
    num_lost = sum(len(found["input_ids"][i]) - max_length for i in long)
    if long:
        some = lambda items: None if items is None else [items[i] for i in long]
        cut = _tokenise(
            tokenizer, some(texts) or [], some(pairs), truncation=True, max_length=max_length
        )
        for name, lists in found.items():
            for i, ids in zip(long, cut[name]):
                lists[i] = ids
    examples = _pad_tokens(found["input_ids"], max_length, tokenizer, where)
    if pairs is not None and "token_type_ids" in found:
        examples["token_type_ids"] = _pad(found["token_type_ids"], max_length, 0)
    return Encoded(examples, len(long), num_lost, len(texts))


def encode_answers(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    prompt: Template = "{prompt}",
    answer: Template = "{answer}",
    where: str = "data",
) -> Encoded:
    """Tokenise prompt and answer for causal language modelling with the loss on the answer.

    The two are tokenised apart, as they are in generation, and the tokenizer's end-of-text token
    follows the answer. A row that is too long loses tokens from the start of its prompt (a
    beginning-of-text token stays); an answer that does not fit beside one token of the prompt is
    cut at its end.

    Returns:
      `input_ids`, `attention_mask`, `lengths`, and `answer_mask` for the answer with its end-of-text
      token.
    """
    prompts = [fill_template(prompt, row, where=where) for row in rows]
    answers = [fill_template(answer, row, where=where) for row in rows]
    return _join(prompts, answers, tokenizer, max_length, where)


def encode_prompts(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    prompt: Template = "{prompt}",
    where: str = "data",
) -> Encoded:
    """Tokenise prompts for generation, cut at their start: `input_ids`, `attention_mask`, `lengths`."""
    prompts = [fill_template(prompt, row, where=where) for row in rows]
    starts = _tokenise(tokenizer, prompts, None)["input_ids"]
    kept = [_cut_start(ids, max_length, tokenizer) for ids in starts]
    lost = [len(ids) - len(short) for ids, short in zip(starts, kept)]
    examples = _pad_tokens(kept, max_length, tokenizer, where)
    return Encoded(examples, sum(n > 0 for n in lost), sum(lost), len(lost))


def encode_choices(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    prompt: Template = "{prompt}",
    choices: str | Callable[[Row], Sequence[str]] = "choices",
    answer: str = " {choice}",
    label_names: Sequence[str] | None = None,
    field: str = "label",
    where: str = "data",
) -> Encoded:
    """Tokenise every choice of a question behind its prompt, for choice by likelihood.

    Args:
      rows: one question each.
      tokenizer: see the module.
      max_length: T.
      prompt: what stands before every choice.
      choices: the field with the list of choices, or a function of the row.
      answer: how a choice is written behind the prompt.
      label_names: the names of the choices in order; None: the label is the choice's number, from 0.
      field: the field of the right choice.
      where: what to call these rows in an error.

    Returns:
      `input_ids`, `attention_mask`, `answer_mask` [n, Ch, T], `lengths` [n, Ch], `labels` [n].
      Rows with fewer choices than others are filled up by repeating their first with an empty answer
      mask: such a choice cannot be chosen. Choices of a row that differ until they are cut are an error:
      which of them is right could not be learned.
    """
    read = choices if callable(choices) else lambda row: row[choices]
    if not callable(choices):
        read_column(rows, choices, where=where)
    lists = [[str(choice) for choice in read(row)] for row in rows]
    most = max(map(len, lists), default=0)
    names = [str(i) for i in range(most)] if label_names is None else list(label_names)
    labels = encode_labels(rows, names, field=field, where=where)
    for i, (items, label) in enumerate(zip(lists, labels)):
        if label >= len(items):
            raise FederationError(
                f"{where}, row {i}: field {field!r} names choice {names[label]!r} of {len(items)}"
            )
    filled = [fill_template(prompt, row, where=where) for row in rows]
    prompts = [text for text, items in zip(filled, lists) for _ in items]
    answers = [answer.format(choice=choice) for items in lists for choice in items]
    origin = [i for i, items in enumerate(lists) for _ in items]
    flat = _join(prompts, answers, tokenizer, max_length, where, end=False, origin=origin)
    starts = np.cumsum([0, *map(len, lists)])[:-1]
    place = np.array(
        [[s + c if c < len(items) else s for c in range(most)] for s, items in zip(starts, lists)],
        np.int64,
    ).reshape(len(rows), most)
    real = np.array([[c < len(items) for c in range(most)] for items in lists], bool)
    examples = {name: leaf[place] for name, leaf in flat.examples.items()}
    examples["answer_mask"] &= real.reshape(len(rows), most, 1)
    return flat._replace(examples=examples | {"labels": labels})


def _join(
    prompts: list[str],
    answers: list[str],
    tokenizer: Any,
    max_length: int,
    where: str,
    *,
    end: bool = True,
    origin: Sequence[int] | None = None,
) -> Encoded:
    """Put tokenised answers behind tokenised prompts.

    `origin` says which answers are choices of one row, and numbers the rows for errors.
    """
    if max_length < 2:
        raise FederationError(f"{where}: max_length must be at least 2, got {max_length}")
    starts = _tokenise(tokenizer, prompts, None)["input_ids"]
    ends = _tokenise(tokenizer, answers, None, add_special_tokens=False)["input_ids"]
    last = getattr(tokenizer, "eos_token_id", None)
    sequences, masks, num_truncated, num_lost = [], [], 0, 0
    firsts: dict[tuple, int] = {}  # of the choices that are alike once they are cut
    for i, (start, finish) in enumerate(zip(starts, ends)):
        if end and last is not None:
            finish = [*finish, last]
        if not start or not finish:
            part = "answer" if start else "prompt"
            row = i if origin is None else origin[i]
            raise FederationError(f"{where}, row {row}: the {part} has no tokens")
        excess = len(start) + len(finish) - max_length
        if excess > 0:
            num_truncated, num_lost = num_truncated + 1, num_lost + excess
            finish = finish[: max_length - 1]
            start = _cut_start(start, max_length - len(finish), tokenizer)
        if origin is not None:
            first = firsts.setdefault((origin[i], *start, None, *finish), i)
            if ends[first] != ends[i]:
                raise FederationError(
                    f"{where}, row {origin[i]}: two choices of {_shorten(prompts[i])!r} are one once "
                    f"they are cut to {max_length} tokens; raise max_length"
                )
        sequences.append([*start, *finish])
        masks.append([False] * len(start) + [True] * len(finish))
    examples = _pad_tokens(sequences, max_length, tokenizer, where)
    examples["answer_mask"] = _pad(masks, max_length, 0).astype(bool)
    return Encoded(examples, num_truncated, num_lost, len(sequences))


def _shorten(text: str, room: int = 80) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."


def _cut_start(ids: list[int], room: int, tokenizer: Any) -> list[int]:
    """Keep the last tokens, and a beginning-of-text token before them where there was one."""
    if len(ids) <= room:
        return ids
    first = getattr(tokenizer, "bos_token_id", None)
    if first is not None and ids[0] == first and room > 1:
        return [first, *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]


def _tokenise(
    tokenizer: Any, texts: list[str], pairs: list[str] | None, **options: Any
) -> dict[str, list[list[int]]]:
    if not texts:
        return {"input_ids": []}
    if hasattr(tokenizer, "model_max_length"):
        options["verbose"] = False  # Hugging Face's own would warn of lengths that are cut here
    found: Mapping[str, Any] = tokenizer(texts, *(() if pairs is None else (pairs,)), **options)
    names = [name for name in ("input_ids", "token_type_ids") if name in found]
    return {name: [list(ids) for ids in found[name]] for name in names}


def _pad_tokens(lists: Sequence[Sequence[int]], width: int, tokenizer: Any, where: str) -> Examples:
    """Put sequences of tokens into arrays. One without tokens is an error that names its row."""
    lengths = np.array([len(ids) for ids in lists], np.int32)
    for i in np.flatnonzero(lengths == 0):
        raise FederationError(f"{where}, row {i}: the text has no tokens")
    return {
        "input_ids": _pad(lists, width, getattr(tokenizer, "pad_token_id", None) or 0),
        "attention_mask": np.arange(width) < lengths[:, None],
        "lengths": lengths,
    }


def _pad(lists: Sequence[Sequence[int]], width: int, value: int) -> np.ndarray:  # i32[n, width]
    rows = np.full((len(lists), width), value, np.int32)
    for row, ids in zip(rows, lists):
        row[: len(ids)] = ids
    return rows

"""TOML text: where each key stands, and how settings are written back."""

import json
import math
import re
import tomllib
from collections.abc import Mapping
from typing import Any

Path = tuple[str | int, ...]
"""Keys from the top of a document down; a number counts the tables of an array."""

_PART = re.compile(r'[ \t]*("(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|[A-Za-z0-9_-]+)[ \t]*')
_QUOTED = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'', re.DOTALL
)
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")


def locate_keys(text: str) -> dict[Path, int]:
    """Return the line, from 1, of every key and table header of a valid TOML document.

    Keys inside an inline table or an array of values stand where their assignment begins, and have no
    entry of their own.
    """
    lines: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    at = _skip(_BLANK, text, 0)
    while at < len(text):
        line = text.count("\n", 0, at) + 1
        if text[at] == "[":
            many = text.startswith("[[", at)
            parts, at = _read_key(text, at + 1 + many)
            table = _resolve(parts, counts, many)
            lines.setdefault(table, line)
            if many:
                lines.setdefault(table[:-1], line)
            at = text.index("]", at) + 1 + many
        else:
            parts, at = _read_key(text, at)
            for length in range(1, len(parts) + 1):
                lines.setdefault((*table, *parts[:length]), line)
            at = _skip_value(text, text.index("=", at) + 1)
        at = _skip(_BLANK, text, at)
    return lines


def _skip(pattern: re.Pattern, text: str, at: int) -> int:
    found = pattern.match(text, at)
    return at if found is None else found.end()


def _read_key(text: str, at: int) -> tuple[tuple[str, ...], int]:
    parts = []
    while True:
        found = _PART.match(text, at)
        assert found is not None  # the document is valid
        word, at = found[1], found.end()
        parts.append(next(iter(tomllib.loads(f"{word} = 0"))))
        if text[at : at + 1] != ".":
            return tuple(parts), at
        at += 1


def _resolve(parts: tuple[str, ...], counts: dict[Path, int], many: bool) -> Path:
    """Put the number of the last table behind every part that names an array of tables."""
    path: Path = ()
    for i, part in enumerate(parts):
        path = (*path, part)
        if many and i == len(parts) - 1:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path


def _skip_value(text: str, at: int) -> int:
    """Return where a value ends: at its line's end, or past its last closing bracket."""
    depth = 0
    while at < len(text):
        char = text[at]
        if char in "\"'":
            at = _skip(_QUOTED, text, at)
            continue
        if char == "#":
            at = text.find("\n", at) if "\n" in text[at:] else len(text)
            continue
        if char == "\n" and depth == 0:
            return at
        depth += (char in "[{") - (char in "]}")
        at += 1
    return at


def write_toml(settings: Mapping[str, Any]) -> str:
    """Write nested mappings as TOML. Entries that are None are left out: TOML has no word for them.

    `tomllib.loads` reads it back with tuples as lists.
    """
    lines: list[str] = []
    _write_table(settings, (), lines)
    return "\n".join(lines).strip("\n") + "\n"


def _write_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    rest = []
    for key, value in table.items():
        if isinstance(value, Mapping) or _is_tables(value):
            rest.append((key, value))
        elif value is not None:
            lines.append(f"{_write_key(key)} = {_write_value(value)}")
    for key, value in rest:
        name = ".".join(map(_write_key, (*path, key)))
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]"]
            _write_table(value, (*path, key), lines)
            continue
        for entry in value:
            lines += ["", f"[[{name}]]"]
            _write_table(entry, (*path, key), lines)


def _is_tables(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(entry, Mapping) for entry in value)
    )


def _write_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _write_value(key)


def _write_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_write_value, value)) + "]"
    raise TypeError(f"TOML has no form for {type(value).__name__}")

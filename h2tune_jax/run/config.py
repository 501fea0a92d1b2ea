"""Read a run's settings from TOML, with errors that name file, line and key; write them back.

    config = load_config("run.toml", ["rounds=20", "groups.minilm.rank=4"])

The settings themselves are in `run.settings`; all of them can be imported from here.
"""

import hashlib
import json
import os
import re
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from h2tune_jax.run import toml_text
from h2tune_jax.run.settings import (
    METRICS,
    BudgetConfig,
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    GroupConfig,
    LogConfig,
    MethodConfig,
    ModelConfig,
    NewcomersConfig,
    PartitionConfig,
    ProbeConfig,
    PruneConfig,
    RunConfig,
    SamplingConfig,
    ScheduleConfig,
    Settings,
    ShapeConfig,
    StopConfig,
    StoreConfig,
    TaskConfig,
)
from h2tune_jax.types import FederationError, near_match

__all__ = [
    "METRICS",
    "BudgetConfig",
    "CheckpointConfig",
    "ConfigError",
    "EngineConfig",
    "EvaluationConfig",
    "GroupConfig",
    "LogConfig",
    "MethodConfig",
    "ModelConfig",
    "NewcomersConfig",
    "PartitionConfig",
    "ProbeConfig",
    "Problem",
    "PruneConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Settings",
    "ShapeConfig",
    "StopConfig",
    "StoreConfig",
    "TaskConfig",
    "config_digest",
    "config_toml",
    "load_config",
    "make_config",
    "parse_config",
]


class Problem(NamedTuple):
    """One thing that is wrong with a config."""

    where: str  # "run.toml:12", "--set rank=x", or "" where there is no text
    key: str  # "groups.0.model.source"
    reason: str

    def __str__(self):
        return ": ".join(part for part in (self.where, self.key, self.reason) if part)


class ConfigError(FederationError):
    """A config that cannot be run; the message has a line for each problem."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, change it by `overrides` ("key=value"), and check all of it.

    Paths in it (`task.data`, `model.source`, `model.tokenizer`) are relative to the file's folder, and
    absolute in the result. Raises `ConfigError`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError([Problem(str(path), "", f"cannot be read: {reason}")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(str(path), "", f"not UTF-8 text: {error}")]) from None
    return parse_config(text, overrides, where=str(path), folder=path.parent)


def parse_config(
    text: str,
    overrides: Sequence[str] = (),
    *,
    where: str = "config",
    folder: str | os.PathLike | None = None,
) -> RunConfig:
    """Do the same with TOML text; `where` names it in errors, `folder` is what paths are relative to."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"line (\d+)", str(error))
        place = f"{where}:{at[1]}" if at else where
        raise ConfigError([Problem(place, "", f"not TOML: {error}")]) from None
    lines = toml_text.locate_keys(text)
    places = {path: f"{where}:{line}" for path, line in lines.items()}
    for override in overrides:
        places |= _override(data, override)
    if folder is not None:
        _anchor_paths(data, Path(folder))
    return _check(data, places, where)


def make_config(data: Mapping[str, Any]) -> RunConfig:
    """Check settings given as nested mappings, as in a notebook. Raises `ConfigError`."""
    return _check(dict(data), {}, "")


def _check(data: Any, places: Mapping[toml_text.Path, str], where: str) -> RunConfig:
    # Imported here: the catalog imports the methods, which settings alone do not need.
    from h2tune_jax.run import catalog

    def locate(path: toml_text.Path) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in places:
                return places[path[:length]]
        return where

    try:
        config = RunConfig.model_validate(data)
    except pydantic.ValidationError as error:
        problems = []
        for entry in error.errors():
            path, reason = _explain(entry)
            problems.append(Problem(locate(path), _dotted(path), reason))
        raise ConfigError(problems) from None
    try:
        catalog.build_method(config)
    except catalog.OptionError as error:
        path = ("method", error.option)
        raise ConfigError([Problem(locate(path), _dotted(path), error.reason)]) from None
    return config


def _dotted(path: toml_text.Path) -> str:
    return ".".join(map(str, path))


def _explain(entry: Any) -> tuple[toml_text.Path, str]:
    """Turn one of pydantic's errors into a key and a reason in plain words."""
    kind, path, given = entry["type"], tuple(entry["loc"]), entry.get("input")
    context = entry.get("ctx", {})
    if kind == "contradiction":
        further = [int(p) if p.isdigit() else p for p in context["field"].split(".") if p]
        return (*path, *further), context["reason"]
    if kind == "extra_forbidden":
        model = _model_at(path[:-1])
        return path, f"unknown key; {near_match(str(path[-1]), model.model_fields)}"
    if kind == "missing":
        what = _describe(_model_at(path[:-1]), str(path[-1]))
        extra = "; give it here, or as method.rank for all" if path[-1] == "rank" else ""
        return path, f"missing; expected {what}{extra}"
    if kind == "literal_error":
        allowed = _literals(_model_at(path[:-1]), path)
        return path, f"{given!r} is unknown; {near_match(str(given), allowed)}"
    if kind == "string_pattern_mismatch":
        return path, f"{given!r}: only letters, digits, '-' and '_' are allowed"
    if kind == "choice":
        return path, f"{entry['msg']}, not {given!r}"
    if kind in ("int_type", "string_type", "float_type", "bool_type", "tuple_type", "model_type"):
        wanted = _TYPES.get(kind) or _describe(_model_at(path[:-1]), str(path[-1]))
        return (
            path,
            f"must be {wanted}, not {'a table' if isinstance(given, Mapping) else repr(given)}",
        )
    reason = entry["msg"].removeprefix("Input should be ")
    return path, f"must be {reason}, not {given!r}".replace("greater than or equal to", "at least")


_TYPES = {
    "int_type": "a whole number",
    "string_type": "text",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
}


def _model_at(path: toml_text.Path) -> type[Settings]:
    """Return the settings class that a path of keys leads to."""
    model: type[Settings] = RunConfig
    for part in path:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            inner = [a for a in _inner_types(field.annotation) if isinstance(a, type)]
            model = next((a for a in inner if issubclass(a, Settings)), model)
    return model


def _inner_types(annotation: Any) -> list[Any]:
    """Return a type and all that it is made of."""
    found = [annotation]
    for argument in typing.get_args(annotation):
        found += _inner_types(argument)
    return found


def _literals(model: type[Settings], path: toml_text.Path) -> list[str]:
    while path and not isinstance(path[-1], str):
        path = path[:-1]
        model = _model_at(path[:-1])
    words = []
    for annotation in _inner_types(model.model_fields[str(path[-1])].annotation):
        if typing.get_origin(annotation) is typing.Literal:
            words += typing.get_args(annotation)
    return words


def _describe(model: type[Settings], name: str) -> str:
    annotation = model.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return f"a table with {', '.join(annotation.model_fields)}"
    if name == "groups":
        return "one table [[groups]] or more"
    return {int: "a whole number", str: "text", float: "a number"}.get(
        typing.cast(Any, annotation), "a value"
    )


def _override(data: dict[str, Any], override: str) -> dict[toml_text.Path, str]:
    """Apply one "key=value"; -> the places of what it set.

    A group is named by its number or its name; "*" means all. The value "none" takes a key out, but for
    a method's options, which it sets to None.
    """
    where = f"--set {override}"
    key, sign, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not sign or not all(parts):
        raise ConfigError([Problem(where, "", "expected key=value, such as method.name=local")])
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    places = {}
    for owner, path in _find_tables(data, parts[:-1], where):
        if value == "none" and parts[0] != "method":  # a method's option may be None itself
            owner.pop(parts[-1], None)
        else:
            owner[parts[-1]] = value
        places[(*path, parts[-1])] = where
    return places


def _find_tables(
    data: dict[str, Any], parts: Sequence[str], where: str
) -> list[tuple[dict[str, Any], toml_text.Path]]:
    """Return the tables that a path names, making those that are missing."""
    found: list[tuple[Any, toml_text.Path]] = [(data, ())]
    for part in parts:
        following = []
        for table, path in found:
            if isinstance(table, list):
                names = [str(entry.get("name")) for entry in table if isinstance(entry, dict)]
                chosen = [i for i, n in enumerate(names) if part in ("*", str(i), n)]
                if not chosen:
                    reason = f"no group is called {part!r}; {near_match(part, names)}"
                    raise ConfigError([Problem(where, _dotted(path), reason)])
                following += [(table[i], (*path, i)) for i in chosen]
            else:
                following.append((table.setdefault(part, {}), (*path, part)))
        found = following
    for table, path in found:
        if not isinstance(table, dict):
            raise ConfigError([Problem(where, _dotted(path), "is no table, so it has no keys")])
    return found


_PATH_KEYS = (("task", "data"), ("model", "source"), ("model", "tokenizer"))


def _anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Make the paths in a config absolute: they are relative to the folder of its file."""
    groups = data.get("groups")
    owners = [(data, "probe", "data")]
    for group in groups if isinstance(groups, list) else ():
        owners += [(group, table, key) for table, key in _PATH_KEYS]
    for owner, table, key in owners:
        part = owner.get(table) if isinstance(owner, dict) else None
        value = part.get(key) if isinstance(part, dict) else None
        if isinstance(value, str) and _is_path(value):
            assert isinstance(part, dict)
            part[key] = str((folder / Path(value).expanduser()).resolve())


def _is_path(value: str) -> bool:
    """A name without a slash and a file's ending is a name; `hub:` is said in as many words."""
    return not value.startswith("hub:") and ("/" in value or "\\" in value or "." in value)


def config_toml(config: RunConfig) -> str:
    """Write a config with everything that was filled in; `parse_config` gives an equal one back."""
    return toml_text.write_toml(config.model_dump(mode="python"))


def config_digest(config: RunConfig) -> str:
    """Return a digest of all that determines a run's results.

    Left out: the run's name, what is logged, and when checkpoints are written and kept.
    """
    settings = config.model_dump(mode="json", exclude={"name", "log", "checkpoints"})
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()

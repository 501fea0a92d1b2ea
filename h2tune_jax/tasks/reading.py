"""Read rows, as plain dicts, from the usual files and from Hugging Face `datasets`."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from h2tune_jax.types import FederationError, near_match

Row = dict[str, Any]

_NEEDS_DATA = "it needs the extra `data`: pip install 'h2tune-jax[data]'"


def read_rows(
    source: str | os.PathLike,
    *,
    split: str | None = None,
    config: str | None = None,
    encoding: str = "utf-8",
) -> list[Row]:
    """Read a data set.

    Args:
      source: a file that ends in .jsonl, .json (a list of objects), .csv, .tsv or .parquet; a folder
        that `datasets` saved; or the id of a data set on the Hugging Face hub.
      split: which split, for a folder with several splits and for a hub id.
      config: which configuration of the data set, for a hub id.
      encoding: of a text file.

    Returns:
      One dict a row. Values of CSV and TSV files are text.

    Raises:
      FederationError: naming the source, and the line where it is known.
    """
    path = Path(source)
    if path.is_dir():
        return _read_saved(path, split)
    suffix = path.suffix.lower()
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
    if suffix in readers or suffix == ".parquet":
        if not path.is_file():
            raise FederationError(f"there is no file {path}")
        try:
            return _read_parquet(path) if suffix == ".parquet" else readers[suffix](path, encoding)
        except UnicodeDecodeError as error:
            raise FederationError(f"{path}: not {encoding} text ({error})") from None
    if path.exists():
        known = [*readers, ".parquet"]
        raise FederationError(
            f"{path}: files of this kind cannot be read; {near_match(suffix, known)}"
        )
    return _read_hub(str(source), split, config)


def _read_jsonl(path: Path, encoding: str) -> list[Row]:
    rows = []
    with path.open(encoding=encoding) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_parse_row(line, f"{path}:{number}"))
    return rows


def _parse_row(text: str, where: str) -> Row:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise FederationError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise FederationError(f"{where}: expected an object, got {type(row).__name__}")
    return row


def _read_json(path: Path, encoding: str) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding=encoding))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        raise FederationError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FederationError(f"{path}: expected a list of objects")
    return rows


def _read_csv(path: Path, encoding: str) -> list[Row]:
    rows, ragged = read_table(path, encoding=encoding)
    if ragged:
        line, found, expected = ragged[0]
        raise FederationError(f"{path}:{line}: {found} values for {expected} columns")
    return rows


def read_table(
    path: Path, *, encoding: str = "utf-8"
) -> tuple[list[Row], list[tuple[int, int, int]]]:
    """Read a .csv or .tsv file: -> (its rows, what does not fit under its header).

    The latter has (line, number of values, number of columns) for each line that was left out. A
    .tsv file does not quote: a quotation mark there is text.
    """
    tabs = path.suffix.lower() == ".tsv"
    form: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    )
    rows, ragged = [], []
    limit = csv.field_size_limit(2**31 - 1)  # reviews can be long
    try:
        with path.open(encoding=encoding, newline="") as stream:
            reader = csv.reader(stream, **form)
            header = next(reader, None)
            if header is None:
                raise FederationError(f"{path}: empty, without a header")
            if len(set(header)) != len(header):
                raise FederationError(f"{path}: a column name occurs twice in {header}")
            for values in reader:
                if len(values) == len(header):
                    rows.append(dict(zip(header, values)))
                elif values:
                    ragged.append((reader.line_num, len(values), len(header)))
    except csv.Error as error:
        raise FederationError(f"{path}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    return rows, ragged


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise FederationError(f"{path}: Parquet cannot be read here; {_NEEDS_DATA}") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise FederationError(f"{path}: not Parquet ({error})") from None


def _import_datasets(source: object) -> Any:
    try:
        import datasets
    except ImportError:
        raise FederationError(f"{source}: no file, and not to be had; {_NEEDS_DATA}") from None
    return datasets


def _read_saved(path: Path, split: str | None) -> list[Row]:
    datasets = _import_datasets(path)
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise FederationError(f"{path}: not a folder that `datasets` saved ({error})") from None
    return _pick_split(found, split, str(path))


def _read_hub(name: str, split: str | None, config: str | None) -> list[Row]:
    datasets = _import_datasets(name)
    try:
        found = datasets.load_dataset(name, config)
    except Exception as error:  # the hub's client raises many kinds; each ends here, by name
        raise FederationError(
            f"{name!r} is no file here, and could not be had from the Hugging Face hub: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _pick_split(found, split, name)


def _pick_split(found: Any, split: str | None, source: str) -> list[Row]:
    if not isinstance(found, dict):
        if split is not None:
            raise FederationError(f"{source}: it has no splits, but {split!r} is asked for")
        return found.to_list()
    if split is None and len(found) == 1:
        split = next(iter(found))
    if split not in found:
        raise FederationError(
            f"{source}: no split is called {split!r}; {near_match(str(split), found)}"
        )
    return found[split].to_list()


def read_column(rows: Sequence[Row], field: str, *, where: str = "data") -> list[Any]:
    """Return one field of every row; a row without it is an error that names the row."""
    values = []
    for number, row in enumerate(rows):
        if field not in row:
            raise FederationError(
                f"{where}, row {number}: no field is called {field!r}; {near_match(field, row)}"
            )
        values.append(row[field])
    return values

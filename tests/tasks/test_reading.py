import os
import subprocess
import sys

import numpy as np
import pytest

from h2tune_jax.tasks.reading import read_column, read_rows
from h2tune_jax.types import FederationError

ROWS = [{"text": 'a "b", c', "label": "x"}, {"text": "zwei\nZeilen ü", "label": "y"}]


def write(path, text, **options):
    path.write_text(text, **{"encoding": "utf-8", **options})
    return path


def test_jsonl_and_json(tmp_path):
    lines = '{"text": "a \\"b\\", c", "label": "x"}\n\n{"text": "zwei\\nZeilen ü", "label": "y"}\n'
    assert read_rows(write(tmp_path / "a.jsonl", lines)) == ROWS
    joined = "[" + lines.replace("\n\n", ",") + "]"
    assert read_rows(write(tmp_path / "a.json", joined)) == ROWS


def test_csv_quotes_and_tsv_does_not(tmp_path):
    text = 'text,label\n"a ""b"", c",x\n"zwei\nZeilen ü",y\n'
    assert read_rows(write(tmp_path / "a.csv", text)) == ROWS
    tabs = 'text\tlabel\n"Stop, he said\tx\n'
    assert read_rows(write(tmp_path / "a.tsv", tabs)) == [{"text": '"Stop, he said', "label": "x"}]
    latin = write(tmp_path / "b.csv", "text\nü\n", encoding="latin-1")
    assert read_rows(latin, encoding="latin-1") == [{"text": "ü"}]


def test_a_long_field(tmp_path):
    long = "word " * 100_000
    assert read_rows(write(tmp_path / "a.csv", f"text\n{long}\n")) == [{"text": long}]


def test_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": "a", "n": 1, "scores": [0.5, 1.0]}, {"text": "b", "n": 2, "scores": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == rows


def test_saved_hugging_face_data(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    assert read_rows(tmp_path / "one") == ROWS
    both = datasets.DatasetDict({"train": one, "test": datasets.Dataset.from_list(ROWS[:1])})
    both.save_to_disk(str(tmp_path / "both"))
    assert read_rows(tmp_path / "both", split="test") == ROWS[:1]
    with pytest.raises(
        FederationError, match=r"'tran'.*allowed: train, test; did you mean 'train'"
    ):
        read_rows(tmp_path / "both", split="tran")
    with pytest.raises(FederationError, match="no split is called None"):
        read_rows(tmp_path / "both")
    with pytest.raises(FederationError, match="no splits"):
        read_rows(tmp_path / "one", split="train")


def test_a_hub_id_without_a_hub_says_so(tmp_path):
    code = (
        "from h2tune_jax.tasks import read_rows\n"
        "from h2tune_jax.types import FederationError\n"
        "try: read_rows('nobody/nothing-here')\n"
        "except FederationError as error: print(error)\n"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | offline,
        cwd=tmp_path,
    )
    assert done.stdout.startswith("'nobody/nothing-here' is no file here, and could not be had")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: expected an object, got list"),
        ("a.json", '{"a": 1}', "expected a list of objects"),
        ("a.json", "[", "not JSON"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: 1 values for 2 columns"),
        ("a.csv", "a,a\n1,2\n", "a column name occurs twice"),
        ("a.csv", "", "without a header"),
        ("a.csv", 'a\n"b\n', "not CSV"),
        ("a.parquet", "no", "not Parquet"),
        ("a.txt", "no", r"cannot be read; allowed: .jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    with pytest.raises(FederationError, match=message):
        read_rows(write(tmp_path / name, text))


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(FederationError, match=r"there is no file .*gone\.csv"):
        read_rows(tmp_path / "gone.csv")
    for name in ("a.csv", "a.jsonl", "a.json"):
        path = write(tmp_path / name, "text\nü\n", encoding="latin-1")
        with pytest.raises(FederationError, match="not utf-8 text"):
            read_rows(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FederationError, match="not a folder that `datasets` saved"):
        read_rows(tmp_path / "folder")


def test_a_missing_field_is_named():
    with pytest.raises(FederationError, match=r"client 'a', row 1: no field .*'labl'.*'label'"):
        read_column([{"labl": 1, "label": 2}, {"label": 3}], "labl", where="client 'a'")
    np.testing.assert_array_equal(read_column([{"n": 1}, {"n": 2}], "n"), [1, 2])

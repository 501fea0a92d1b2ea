"""The lines of a run: exact numbers, whole lines, and cutting back."""

import errno
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from h2tune_jax.run.checkpoint import file_digest
from h2tune_jax.run.folder import RunError
from h2tune_jax.run.records import Log, encode, lines_size, plain, read_lines, read_log


def test_numbers_read_back_exactly():
    rng = np.random.default_rng(0)
    single = rng.normal(size=50).astype(np.float32)
    values = {
        "single": jnp.asarray(single),
        "half": jnp.asarray([0.1, 65000.0], jnp.bfloat16),
        "double": rng.normal(size=3),
        "count": np.int64(2**53 + 1),
        "flag": np.asarray([True, False]),
        "scalar": jnp.float32(0.1),
        "nested": {"pair": (1, [2.5])},
    }
    back = json.loads(encode(plain(values)))
    np.testing.assert_array_equal(np.asarray(back["single"], np.float32), single)
    np.testing.assert_array_equal(jnp.asarray(back["half"], jnp.bfloat16), values["half"])
    np.testing.assert_array_equal(back["double"], values["double"])
    assert back["count"] == 2**53 + 1
    assert back["flag"] == [True, False]
    assert np.float32(back["scalar"]) == np.float32(0.1)
    assert back["nested"] == {"pair": [1, [2.5]]}


def test_what_is_not_finite_is_null():
    line = plain({"loss": np.asarray([1.0, np.nan, np.inf], np.float32), "own": -math.inf})
    assert json.loads(encode(line)) == {"loss": [1.0, None, None], "own": None}


def test_a_log_goes_on_where_it_is_told_to(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = Log(path, 0)
    log.append({"round": 0})
    mark = log.mark()
    log.append({"round": 1, "loss": 0.5})
    log.close()
    assert mark.sha256 == file_digest(path, mark.size)
    with path.open("ab") as file:
        file.write(b'{"round": 2, "lo')  # a kill
    assert [line["round"] for line in read_lines(path)] == [0, 1]
    assert read_lines(path, mark.size) == [{"round": 0}]

    log = Log(path, mark.size)
    assert log.mark() == mark
    log.append({"round": 1, "loss": 0.25})
    log.sync()
    assert log.mark().sha256 == file_digest(path)
    log.close()
    assert read_lines(path) == [{"round": 0}, {"round": 1, "loss": 0.25}]


def test_lines_of_rounds_that_will_come_again_are_told_apart(tmp_path):
    path = tmp_path / "timings.jsonl"
    assert lines_size(path, 3) == 0
    lines = [encode({"round": r}) for r in (-1, 0, 1, 2)]
    path.write_bytes(b"".join(lines) + b'{"rou')
    assert lines_size(path, 2) == sum(map(len, lines[:3]))
    assert lines_size(path, 9) == sum(map(len, lines))
    path.write_bytes(lines[0] + b"\x00\n" + lines[1])
    assert lines_size(path, 9) == len(lines[0])


def test_a_damaged_line_ends_what_is_read_and_is_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == ([], "")
    path.write_bytes(encode({"round": 0}) + b'{"round": ?}\n' + encode({"round": 2}))
    said = "line 2 of metrics.jsonl is damaged, and what follows is left out"
    assert read_log(path) == ([{"round": 0}], said)
    path.write_bytes(encode({"round": 0}) + b'{"round": 1')  # being written
    assert read_log(path) == ([{"round": 0}], "")


def test_a_log_that_the_machine_refuses_is_not_an_empty_one(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics.jsonl cannot be read from .*: Is a directory"):
        read_lines(tmp_path / "metrics.jsonl")


def test_a_full_disk_leaves_the_lines_that_were_there(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = Log(path, 0)
    log.append({"round": 0})

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if len(data) < 8:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:5])

        def close(self):
            self.file.close()

    log._file = Full(log._file)
    with pytest.raises(
        RunError, match=r"metrics.jsonl cannot be written to .*: No space left on device"
    ):
        log.append({"round": 1})
    log.close()
    assert read_lines(path) == [{"round": 0}]

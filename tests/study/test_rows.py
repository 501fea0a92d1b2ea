"""Rows are written piece by piece, and only finished pieces count."""

import numpy as np
import pytest

from h2tune_jax.study import rows
from h2tune_jax.study.horizon import BINS, Outcome
from h2tune_jax.study.norms import Norms
from h2tune_jax.types import FederationError

SETTING = {"name": "a/b", "constants": (0.5, 1.0), "seeds": 2}
CONSTANTS, SEEDS = [0.5, 0.5, 1.0, 1.0], [0, 1, 0, 1]


def outcome(offset):
    each = lambda k: offset + k + np.arange(4) / 10
    binned = np.full((4, BINS), np.nan)
    binned[:, :3] = np.arange(4)[:, None] + np.arange(3)[None, :]
    return Outcome(
        mean=Norms(*map(each, range(4))),
        last=Norms(*map(each, range(4, 8))),
        binned=Norms(*(binned,) * 4),
        rejected=np.array([0, 0, 3, 0]),
    )


def write(path, horizon):
    rows.write_piece(path, SETTING, horizon, CONSTANTS, SEEDS, outcome(horizon), "1.5 s, here")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "a-b.csv"
    assert rows.read_finished(path, SETTING) == []
    write(path, 32)
    write(path, 16)
    table = rows.read_rows(path)
    assert tuple(table) == rows.COLUMNS
    np.testing.assert_array_equal(table["horizon"], np.repeat([16, 32], 4))
    horizons, values = rows.by_seed(table, 1.0, table["personal"])
    np.testing.assert_array_equal(horizons, [16, 32])
    np.testing.assert_allclose(values, [[17.2, 17.3], [33.2, 33.3]])
    np.testing.assert_allclose(rows.by_seed(table, 0.5, table["last_loss"])[1][0], [22.0, 22.1])
    assert table["rejected"].sum() == 6
    assert rows.read_setting(path)["constants"] == [0.5, 1.0]
    assert rows.read_notes(path) == ["horizon 32: 1.5 s, here", "horizon 16: 1.5 s, here"]


def test_a_piece_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "rows.csv"
    write(path, 16)
    whole = path.read_text()
    write(path, 32)
    cut = path.read_text()[:-40]
    path.write_text(cut)
    assert rows.read_finished(path, SETTING) == [16]
    assert path.read_text() == whole
    write(path, 32)
    assert rows.read_finished(path, SETTING) == [16, 32]


def test_nothing_is_run_or_written_twice(tmp_path):
    path = tmp_path / "rows.csv"
    write(path, 16)
    with pytest.raises(FederationError, match="finished already"):
        write(path, 16)
    with pytest.raises(FederationError, match=r"another setting \(it differs in seeds\)"):
        rows.read_finished(path, {**SETTING, "seeds": 3})


def test_rounds(tmp_path):
    path = tmp_path / "rounds.csv"
    rows.write_rounds(path, 5, CONSTANTS, outcome(0))
    table = rows.read_rounds(path)
    np.testing.assert_array_equal(table["first_round"], [0, 1, 3] * 2)
    np.testing.assert_array_equal(table["last_round"], [0, 2, 4] * 2)
    np.testing.assert_allclose(table["scale"], [0.5, 1.5, 2.5, 2.5, 3.5, 4.5])


def test_numbers_that_are_not_finite_are_kept(tmp_path):
    path = tmp_path / "rows.csv"
    odd = outcome(0)
    odd = odd._replace(mean=odd.mean._replace(loss=np.array([np.nan, np.inf, 1.0, 2.0])))
    rows.write_piece(path, SETTING, 16, CONSTANTS, SEEDS, odd, "1.0 s, here")
    np.testing.assert_array_equal(rows.read_rows(path)["loss"], [np.nan, np.inf, 1.0, 2.0])

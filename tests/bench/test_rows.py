import dataclasses

import pytest

from h2tune_jax.bench import machine, rows, table
from h2tune_jax.bench.cases import default_case


def make_row(**changes):
    row = dict.fromkeys(rows.COLUMNS) | dataclasses.asdict(default_case("tiny", "cpu"))
    row |= {"time": "2026-11-20T10:00:00+00:00", "device": "a, cpu", "platform": "cpu", "runs": 3}
    row |= {"seconds": 0.5, "seconds_low": 0.25, "seconds_high": 1.0, "share_of_peak": 0.125}
    return row | {"clients_per_second": 8.0, "gflops": 1234.5678, "peak_bytes": 2.5e9} | changes


def test_rows_come_back_as_they_were_written(tmp_path):
    file = tmp_path / "new" / "rows.csv"
    written = [make_row(), make_row(skipped='it is too large, "they" say', seconds=None)]
    rows.append(file, written[:1])
    rows.append(file, written[1:])
    assert file.read_text().count("time,model") == 1
    for one, other in zip(rows.read(file), written, strict=True):
        assert one == {
            k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in other.items()
        }


def test_rows_do_not_go_into_a_file_of_other_columns(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("time,model\n")
    with pytest.raises(ValueError, match="its columns are not those of this version"):
        rows.append(file, [make_row()])
    assert file.read_text() == "time,model\n"


def test_no_file_holds_no_rows(tmp_path):
    assert rows.read(tmp_path / "none.csv") == []


def test_the_newest_of_each_key_stays():
    found = [{"k": 1, "v": 1}, {"k": 2, "v": 2}, {"k": 1, "v": 3}]
    assert rows.newest(found, ("k",)) == [{"k": 1, "v": 3}, {"k": 2, "v": 2}]


def test_a_spread_is_the_median_and_the_quartiles():
    assert machine.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert machine.spread([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.0123456, "0.0123"), (1.5, "1.50"), (123.4, "123"), (12345.6, "12,300")],
)
def test_numbers_are_written_with_three_digits(value, text):
    assert table.number(value) == text


def test_a_skipped_case_shows_its_reason_instead_of_numbers():
    shown = table.cells(make_row(skipped="no room"))
    assert shown[7] == "skipped: no room"
    assert len(shown) == len(table.HEADS)
    assert table.cells(make_row())[7:] == [
        "0.500 (0.250-1.00)", "8.00", "-", "-", "2.50", "1,230", "12 %",
    ]  # fmt: skip


def test_tables_line_up():
    assert table.plain(("a", "long"), [("xyz", "1")]) == "a    long\nxyz  1"
    assert table.markdown(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"

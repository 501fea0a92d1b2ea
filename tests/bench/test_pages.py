"""The targets and the page are made from rows, whatever these say."""

import importlib
import sys
from pathlib import Path

import pytest

from h2tune_jax.bench import rows

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "throughput"
SCRIPTS = ("compare", "flat", "targets", "pages")


@pytest.fixture
def modules(monkeypatch):
    """The scripts as modules, gone afterwards: their names are common."""
    monkeypatch.syspath_prepend(str(FOLDER))
    assert not sys.modules.keys() & set(SCRIPTS)
    yield {name: importlib.import_module(name) for name in SCRIPTS}
    for name in SCRIPTS:
        del sys.modules[name]


@pytest.fixture
def scripts(modules, monkeypatch, tmp_path):
    """The same, reading results that are empty at first."""
    monkeypatch.setattr(modules["compare"], "RESULTS", tmp_path / "peers.csv")
    monkeypatch.setattr(modules["flat"], "RESULTS", tmp_path / "flat.csv")
    monkeypatch.setattr(modules["targets"], "MACHINE", tmp_path / "machine.csv")
    monkeypatch.setattr(modules["pages"], "HERE", tmp_path)
    return modules


def write_peers(scripts, *measured):
    compare, lines = scripts["compare"], []
    for stage, program, threads, rate, ratio in measured:
        line = dict.fromkeys(compare.COLUMNS, "")
        line |= {"stage": stage, "program": program, "threads": threads, "ratio": ratio}
        line |= {"clients": 20, "steps": 5, "rounds": 9, "cores": 2, "device": "a cpu"}
        line |= {"version": "1.0", "ratio_low": ratio, "ratio_high": ratio}
        line |= {"seconds": 20 / rate, "seconds_low": 20 / rate, "seconds_high": 20 / rate}
        lines.append(line | {"clients_per_second": rate, "time": "2026-11-20T10:00:00+00:00"})
    rows.append(compare.RESULTS, lines, compare.COLUMNS)


def verdicts(scripts):
    return {
        target.what: (target.measured, target.verdict) for target in scripts["targets"].targets()
    }


def test_what_is_not_measured_is_said_and_not_met(scripts, capsys):
    assert set(verdicts(scripts).values()) == {(None, "not measured yet")}
    assert scripts["targets"].main() == 1
    assert capsys.readouterr().out.count("not measured yet") == 15
    assert scripts["pages"].page().count("Not measured yet.") == 3


def test_targets_compare_each_programs_better_number_of_threads(scripts):
    write_peers(
        scripts,
        ("mlp20", "h2tune_jax", 1, 900.0, None),
        ("mlp20", "h2tune_jax", 2, 1500.0, None),
        ("mlp20", "fedjax", 1, 1000.0, None),
        ("mlp20", "fedjax", 2, 600.0, None),
        ("mlp20", "pfl", 1, 700.0, None),
        ("pair20", "h2tune_jax", 2, 1500.0, 1.02),
        ("pair100", "h2tune_jax", 2, 1500.0, 1.07),
    )
    found = verdicts(scripts)
    name = "MLP, {} clients a round: {}".format
    assert found[name(20, "clients/s over fedjax")] == (1.5, "met")
    measured, verdict = found[name(20, "clients/s over pfl")]
    assert (measured, verdict) == (pytest.approx(15 / 7), "missed")
    assert found[name(20, "time over the better bare JAX loop")] == (1.02, "met")
    assert found[name(100, "time over the better bare JAX loop")] == (1.07, "missed")
    page = scripts["pages"].page()
    assert "| pfl | 1.0 | 1 | 20 | 5 |" in page
    assert ">= 2.5 | 2.14 | missed |" in page


def test_the_pairs_ratio_is_that_of_either_sides_better_number_of_threads(scripts):
    reports = {
        ("h2tune_jax", 1): [{"seconds": [1.0, 2.0]}, {"seconds": [3.0]}],
        ("bare JAX, scan", 1): [{"seconds": [2.0, 2.0]}, {"seconds": [2.5]}],
        ("h2tune_jax", 2): [{"seconds": [0.5, 1.0]}, {"seconds": [1.5]}],
        ("bare JAX, scan", 2): [{"seconds": [1.0, 1.0]}, {"seconds": [1.0]}],
        ("bare JAX, vmap", 2): [{"seconds": [9.0, 9.0]}, {"seconds": [9.0]}],
    }
    # Two threads are better for both: ratios 0.5, 1.0, 1.5, whatever ran last.
    for order in (reports, dict(reversed(reports.items()))):
        assert scripts["compare"].paired_ratios(order)["ratio"] == 1.0
    assert scripts["compare"].paired_ratios({("h2tune_jax", 1): [{"seconds": [1.0]}]}) == {}


def test_the_newest_row_counts(scripts):
    write_peers(scripts, ("mlp20", "h2tune_jax", 2, 1500.0, None), ("mlp20", "pfl", 1, 700.0, None))
    write_peers(scripts, ("mlp20", "pfl", 1, 500.0, None))
    assert verdicts(scripts)["MLP, 20 clients a round: clients/s over pfl"] == (3.0, "met")


def test_flatness_is_the_dearest_client_over_the_cheapest(scripts):
    flat = scripts["flat"]
    line = dict.fromkeys(flat.COLUMNS, "") | {"device": "a cpu", "cores": 2, "turns": 7}
    sizes = {16: 5e-4, 100: 4.8e-4, 10_000: 5.4e-4}
    for size, cost in sizes.items():
        line |= {"population": size, "participants": size, "kind": "everyone"}
        line |= {"seconds_per_client": cost, "low": cost, "high": cost}
        rows.append(flat.RESULTS, [line], flat.COLUMNS)
    # Sampling is another question.
    line |= {"participants": 16, "kind": "sampled", "seconds_per_client": 1.0}
    rows.append(flat.RESULTS, [line], flat.COLUMNS)
    what = "MLP: dearest over cheapest client from 16 to 10,000 clients"
    assert verdicts(scripts)[what] == (pytest.approx(1.125), "missed")
    assert "| 16 | 10,000 | 1000000" in scripts["pages"].page()


def test_programs_that_did_other_work_are_named(scripts, capsys):
    line = lambda program, check: {"program": program, "check": check, "clients": 20}
    assert scripts["compare"].same_work([line("one", 4.25), line("two", 4.25 * (1 + 1e-7))])
    assert not scripts["compare"].same_work([line("one", 4.25), line("lazy", 4.2729)])
    assert "lazy: other work" in capsys.readouterr().out


def test_the_committed_page_is_what_the_rows_give(modules, monkeypatch):
    pages = modules["pages"]
    monkeypatch.setattr(pages, "draw_peers", lambda rows, file: None)
    monkeypatch.setattr(pages.plot, "draw", lambda rows, file: None)
    assert pages.PAGE.read_text() == pages.page()

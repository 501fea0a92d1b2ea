"""The demo's parts, and the demo itself."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny_run

import h2tune_jax.run
from h2tune_jax.run import demo
from h2tune_jax.run.catalog import build_method, method_config
from h2tune_jax.run.demo import Demo, DemoRow, demo_config, fetch_assets, format_demo, run_demo
from h2tune_jax.tasks import assets


def test_the_config_has_clients_that_differ_in_model_and_in_task():
    config = demo_config(["rounds=2"])
    assert config.rounds == 2
    models = [(group.model.source, str(group.model.prune)) for group in config.groups]
    tasks = [group.task.data for group in config.groups]
    assert len(set(models)) == len(set(tasks)) == 3
    assert len(set(zip(models, tasks))) == len(config.groups) == 4
    # Every client for itself trains at the same rates, and its head too.
    local, h2tune = (build_method(method_config(config.method, name)) for name in demo.METHODS)
    for name, rate in local.hyper._asdict().items():
        assert rate == getattr(h2tune.hyper, name), name


def test_table():
    rows = [
        DemoRow("a", "trec", 0.25, {"local": 0.5, "h2tune": 0.625}),
        DemoRow("long name", "sms", 0.5, {"local": 0.75, "h2tune": 0.45}),
    ]
    lines = format_demo(rows).splitlines()
    assert lines[0].endswith("majority  local  h2tune  gain over local")
    assert lines[1].split() == ["a", "trec", "25.0", "50.0", "62.5", "+12.5"]
    assert lines[2].split() == ["long", "name", "sms", "50.0", "75.0", "45.0", "-30.0"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("name", ["trec", "smollm2", "sms"])
def test_only_what_is_missing_is_fetched(monkeypatch, tmp_path, name):
    """Models, data, and the texts of the probe."""
    monkeypatch.setenv("H2TUNE_ASSETS", str(tmp_path))
    missing = lambda folder, archive, *, verify: "not there" if folder.name == name else None
    monkeypatch.setattr(assets, "find_damage", missing)
    fetched, said = [], []
    monkeypatch.setattr(assets, "fetch", fetched.append)
    fetch_assets(demo_config(), said.append)
    assert fetched == [name]
    assert said[0].startswith(f"fetching {name}: ")


def test_the_report_is_about_the_method_and_interrupts_are_told(tmp_path, monkeypatch):
    config = tiny_run.tiny_config(tmp_path)
    seen = []

    class Interrupted:
        reason = "interrupted"

    def simulate(config, **options):
        seen.append((config.method.name, config.name, options["out"], options["resume"]))
        return Interrupted()

    monkeypatch.setattr(demo, "simulate", simulate)
    assert run_demo(config, tmp_path / "out") == Demo((), None, True)
    assert seen == [("local", "tiny local", tmp_path / "out" / "local", True)]


@pytest.mark.slow
def test_tiny_demo_recomputes_what_the_run_recorded(tmp_path):
    config = tiny_run.tiny_config(tmp_path, "rounds=2")
    found = run_demo(config, tmp_path / "out")
    assert not found.interrupted
    assert found.report == tmp_path / "out" / "report.html"
    assert found.report.stat().st_size > 1000
    for method in ("local", "h2tune"):
        lines = (tmp_path / "out" / method / "metrics.jsonl").read_text().splitlines()
        recorded = json.loads(lines[-1])["evaluation"]["trained"]
        for row in found.rows:
            values = recorded[row.group]["accuracy"]
            assert row.accuracy[method] == pytest.approx(sum(values) / len(values), abs=1e-6)
    # A second call runs nothing again.
    stamp = (tmp_path / "out" / "h2tune" / "metrics.jsonl").stat().st_mtime_ns
    assert run_demo(config, tmp_path / "out").rows == found.rows
    assert (tmp_path / "out" / "h2tune" / "metrics.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_the_demo_beats_the_majority_and_staying_alone(tmp_path):
    """As a user runs it: in a process of its own, compiled in full."""
    try:
        fetch_assets(demo_config(), print)
    except assets.AssetUnavailable as error:
        pytest.skip(str(error))
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "h2tune_jax.cli", "demo", "--out", str(tmp_path / "demo")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = re.findall(
        r"^(\S+) +(\S+) +([\d.]+) +([\d.]+) +([\d.]+) +([+-][\d.]+)$", done.stdout, re.M
    )
    assert len(table) == 4
    gains = []
    for _, _, majority, local, h2tune, gain in table:
        assert float(h2tune) >= float(majority) + 10
        assert float(gain) == pytest.approx(float(h2tune) - float(local), abs=0.11)
        gains.append(float(gain))
    assert sum(gains) / len(gains) > 1
    assert f"report: {tmp_path / 'demo' / 'report.html'}" in done.stdout


# The package's names


def test_names_are_there_when_asked_for():
    assert set(h2tune_jax.run.__all__) == set(h2tune_jax.run._HOMES)
    for name in h2tune_jax.run.__all__:
        assert getattr(h2tune_jax.run, name) is not None
    assert set(h2tune_jax.run.__all__) <= set(dir(h2tune_jax.run))
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = h2tune_jax.run.simulat  # pyright: ignore


def test_the_shell_is_imported_only_when_it_is_used():
    program = (
        "import sys, h2tune_jax.run; h2tune_jax.run.__all__;"
        "print([m for m in ('pydantic', 'rich', 'typer', 'orbax') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

import csv
import io
import logging
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_run import tiny_config

from h2tune_jax.bench import machine
from h2tune_jax.run import compare as comparing
from h2tune_jax.run import memory
from h2tune_jax.run.compare import (
    begun_together,
    compare,
    comparison_table,
    going_on,
    run_config,
)
from h2tune_jax.run.config import make_config
from h2tune_jax.run.describe import describe
from h2tune_jax.run.events import Finished, Notice, RoundDone, Started
from h2tune_jax.run.federation import build_federation
from h2tune_jax.run.folder import RunError, RunFolder
from h2tune_jax.run.loop import simulate
from h2tune_jax.run.notices import read_notices
from h2tune_jax.run.records import read_lines
from h2tune_jax.run.report.view import final_score, read_view
from h2tune_jax.run.stopping import is_finished
from h2tune_jax.types import FederationError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def small(data, **changes):
    """One group, and a method that compiles fast."""
    settings = tiny_config(data).model_dump()
    method = {"name": "local", "learning_rate": 0.01}
    settings |= {"groups": settings["groups"][1:], "rounds": 2, "method": method}
    return make_config(settings | changes)


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    """(config, folder, comparison, events) of two methods and two seeds."""
    out = tmp_path_factory.mktemp("compared") / "out"
    config = small(data)
    events = []
    found = compare(config, ["ffa_lora", "local"], 2, out, [events.append])
    return config, out, found, events


def runs(events):
    return [(e.config.method.name, e.config.seed, e.first_round) for e in events
            if isinstance(e, Started)]  # fmt: skip


def test_every_pair_is_a_whole_run(compared):
    config, out, found, events = compared
    # Of seeds that run together the first is shown.
    assert runs(events) == [("ffa_lora", 3, 0), ("local", 3, 0)]
    for method in ("ffa_lora", "local"):
        for seed in (3, 4):
            assert is_finished(out / method / str(seed), run_config(config, method, seed))
    assert found.baseline == "local"
    assert {score.seed for score in found.scores} == {3, 4}


def test_differences_are_those_of_the_records(compared):
    _, out, found, _ = compared
    values = {
        (method, seed): final_score(read_view(out / method / str(seed))).values["wide"][1]
        for method in ("ffa_lora", "local")
        for seed in (3, 4)
    }
    row = next(row for row in found.rows if row[:3] == ("wide", "accuracy", "ffa_lora"))
    gaps = [values["ffa_lora", seed] - values["local", seed] for seed in (3, 4)]
    assert row.difference.mean == pytest.approx(np.mean(gaps))
    assert row.difference.num_seeds == 2


def test_a_finished_comparison_runs_nothing(compared):
    config, out, found, _ = compared
    events = []
    again = compare(config, ["ffa_lora", "local"], 2, out, [events.append])
    assert runs(events) == []
    said = [e.text for e in events if isinstance(e, Notice)]
    assert said[0] == "ffa_lora, seed 3: finished before"
    assert again == found


def test_more_seeds_run_only_what_is_new(compared, tmp_path):
    config, out, _, _ = compared
    shutil.copytree(out, tmp_path / "out")
    events = []
    compare(config, ["local"], [4, 5], tmp_path / "out", [events.append])
    assert runs(events) == [("local", 5, 0)]


def test_what_is_written(compared):
    _, out, found, _ = compared
    rows = list(csv.DictReader(io.StringIO((out / "comparison.csv").read_text())))
    own = next(row for row in found.rows if row.method == "ffa_lora")
    mine = next(row for row in rows if row["method"] == "ffa_lora")
    assert float(mine["mean"]) == own.mean
    assert float(mine["low"]) == own.difference.low
    assert mine["pairs"] == "2"
    assert (out / "comparison.md").read_text().startswith("| group | method | metric |")
    assert "<svg" in (out / "report.html").read_text()


def test_table_for_a_terminal(compared):
    console = Console(file=io.StringIO(), width=120)
    console.print(comparison_table(compared[2]))
    text = console.file.getvalue()
    for part in ("minus local", "95 % interval", " to "):
        assert part in text


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on(data, tmp_path):
    config, events, asked = small(data, rounds=4), [], []

    def stop():
        return bool(asked)

    def observe(event):
        events.append(event)
        if isinstance(event, RoundDone):
            asked.append(True)

    with pytest.raises(RunError, match="local, seed 3 was interrupted; the same command goes on"):
        compare(config, ["local"], [3], tmp_path, [observe], stop_request=stop)
    assert any(isinstance(e, Finished) and e.reason == "interrupted" for e in events)
    assert not is_finished(tmp_path / "local" / "3", config)
    assert begun_together(tmp_path / "local" / "3", 3) == (3,)
    events.clear()
    compare(config, ["local"], [3], tmp_path, [events.append])
    (begun,) = runs(events)
    assert begun[2] > 0
    assert is_finished(tmp_path / "local" / "3", config)


def test_seeds_together_and_gone_on_with_together(data, tmp_path):
    config, events, asked = small(data, rounds=4), [], []

    def observe(event):
        events.append(event)
        if isinstance(event, RoundDone):
            asked.append(True)

    with pytest.raises(RunError, match="local, seed 3 and 4 was interrupted"):
        compare(config, ["local"], 2, tmp_path, [observe], stop_request=lambda: bool(asked))
    assert any("seeds 3, 4 run together; seed 3 is shown" in getattr(e, "text", "") for e in events)
    # As one program although they would not be begun so: what was begun goes on as it was begun.
    events.clear()
    compare(config, ["local"], 2, tmp_path, [events.append], together=False)
    assert [first > 0 for _, _, first in runs(events)] == [True]
    said = [e.text for e in events if isinstance(e, Notice)]
    assert any(text.startswith("goes on from the checkpoint of round") for text in said)
    # Of seeds that are not shown the notices are.
    assert any(text.startswith("seed 4: goes on from the checkpoint of round") for text in said)
    for seed in (3, 4):
        noted = read_notices(RunFolder(tmp_path / "local" / str(seed)))
        assert ["interrupted after" in line["text"] for line in noted] == [True, False]
    for seed in (3, 4):
        assert begun_together(tmp_path / "local" / str(seed), seed) == (3, 4)
        assert is_finished(tmp_path / "local" / str(seed), run_config(config, "local", seed))
    assert begun_together(tmp_path / "nowhere", 4) == ()


def test_seeds_that_run_alone_are_compiled_once_and_are_what_they_were(data, tmp_path, caplog):
    config, compiled = small(data, store={"kind": "host"}), []

    def watch(event):
        if isinstance(event, Finished):
            compiled.append([line.args[0] for line in caplog.records if "Compiling" in line.msg])
            caplog.clear()

    with jax.log_compiles(), caplog.at_level(logging.DEBUG, logger="jax"):
        compare(config, ["local"], 3, tmp_path, [watch])
    assert {"jit(start)", "jit(round_fn)", "jit(evaluate)"} <= set(compiled[0])
    assert compiled[1:] == [[], []]
    timings = [read_lines(tmp_path / "local" / seed / "timings.jsonl") for seed in "345"]
    assert ["compile_seconds" in lines[0] for lines in timings] == [True, False, False]
    alone = simulate(run_config(config, "local", 5))
    assert read_lines(tmp_path / "local" / "5" / "metrics.jsonl") == alone.records


def test_a_seed_with_other_shapes_says_that_its_rounds_were_compiled(data, tmp_path):
    config = small(data)
    groups = [group.model_dump() for group in config.groups]
    groups[0]["task"]["partition"] = {"kind": "dirichlet", "alpha": 0.3}
    config = small(data, groups=groups)
    compare(config, ["local"], [3, 5], tmp_path, together=False)
    rooms = [build_federation(config.model_copy(update={"seed": seed})).train for seed in (3, 5)]
    assert len({tuple(map(np.shape, jax.tree.leaves(room))) for room in rooms}) == 2
    for seed in "35":
        lines = read_lines(tmp_path / "local" / seed / "timings.jsonl")
        assert ["compile_seconds" in line for line in lines] == [True, False]


def test_seeds_of_a_set_without_folders_belong_to_it():
    assert going_on({1: (1, 2), 2: (), 3: (), 4: (4,)}) == ([(1, 2), (4,)], [3])


def test_how_many_fit(data, monkeypatch):
    config = small(data)
    federation = build_federation(config)
    needs = describe(config, federation).memory
    shared = needs["frozen bases"]
    each = sum(needs.values()) - shared
    for room, expected in ((shared + 3 * each, 3), (shared + 2.9 * each, 2), (0, 1), (1e12, 5)):
        monkeypatch.setattr(comparing, "free_memory", lambda room=room: 2 * room)
        assert comparing.room_for(config, federation, 5) == expected
    host = make_config(config.model_dump() | {"store": {"kind": "host"}})
    assert comparing.room_for(host, federation, 5) == 1
    monkeypatch.setattr(comparing, "free_memory", lambda: None)
    assert comparing.room_for(config, federation, 5) == 1


def test_free_memory_counts_what_the_system_would_give_up(tmp_path, monkeypatch):
    """A cache of files is no memory in use."""
    (tmp_path / "meminfo").write_text(
        "MemFree:  100 kB\nMemAvailable:   5000 kB\nCached: 4000 kB\n"
    )
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert comparing.free_memory() == machine.free_memory() == 5_120_000

    def refuse(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "nowhere")
    monkeypatch.setattr(memory.os, "sysconf", refuse)
    assert comparing.free_memory() is None


def test_another_config_is_refused_before_anything_runs(compared, data):
    _, out, _, _ = compared
    events = []
    with pytest.raises(RunError, match="holds a run of another config"):
        compare(small(data, rounds=3), ["local"], 1, out, [events.append])
    assert not events


def test_options_of_one_method(data):
    config = tiny_config(data)
    assert run_config(config, "h2tune", 5).method == config.method
    assert run_config(config, "h2tune", 5).seed == 5
    # What both have is taken over; what is of h2tune alone is not.
    assert run_config(config, "local", 3).method.options == {"learning_rate": 0.01}
    changed = run_config(config, "local", 3, {"learning_rate": 0.5, "weight_decay": 0.1})
    assert changed.method.options == {"learning_rate": 0.5, "weight_decay": 0.1}
    with pytest.raises(FederationError, match="unknown option of 'local'"):
        run_config(config, "local", 3, {"selection": "block"})


@pytest.mark.parametrize(
    ("methods", "seeds", "more", "message"),
    [
        ([], 1, {}, "at least one method"),
        (["local", "local"], 1, {}, "named twice"),
        (["lokal"], 1, {}, "did you mean 'local'"),
        (["local"], 0, {}, "one seed or more"),
        (["local"], [1, 1], {}, "each once"),
        (["local"], 1, {"baseline": "h2tune"}, "baseline 'h2tune' is not among"),
        (["local"], 1, {"options": {"h2tune": {}}}, "options for 'h2tune'"),
    ],
)
def test_what_cannot_be_compared(data, tmp_path, methods, seeds, more, message):
    with pytest.raises(FederationError, match=message):
        compare(tiny_config(data), methods, seeds, tmp_path, **more)

"""The run's folder: whose it is, who writes, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from h2tune_jax.run import folder as folders
from h2tune_jax.run.folder import RunError, RunFolder, begin_folder, lock_folder, read_facts

CONFIG = 'seed = 1\n[method]\nname = "local"\n'


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    with lock_folder(folder):
        yield folder


def begin(folder, config=CONFIG, digest="abc", resume=False):
    return begin_folder(folder, config, digest, {"seed": 1}, resume=resume)


def test_a_run_notes_what_its_results_depend_on(run):
    assert begin(run) == []
    facts = read_facts(run)
    assert (facts["format"], facts["config_digest"], facts["seed"]) == (1, "abc", 1)
    wanted = {"python", "jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint", "h2tune-jax"}
    assert wanted <= facts["versions"].keys()
    assert "cpu" in facts["device"]
    assert run.config.read_text() == CONFIG
    # A checkout knows its commit, an installed copy does not.
    assert facts["commit"] is None or len(facts["commit"].rstrip("+")) == 40


def test_a_folder_with_a_run_is_taken_up_by_resume_only(run):
    begin(run)
    with pytest.raises(RunError, match=r"holds a run already; resume it \(--resume\)"):
        begin(run)
    assert begin(run, resume=True) == []


def test_another_config_is_refused_and_the_difference_named(run):
    begin(run)
    with pytest.raises(
        RunError, match=r"another config; method.name was 'local' and is 'h2tune'\."
    ):
        begin(run, CONFIG.replace("local", "h2tune"), "xyz", resume=True)
    with pytest.raises(RunError, match=r"rounds was None and is 3; seed was 1 and is 2"):
        begin(run, CONFIG.replace("1", "2\nrounds = 3"), "xyz", resume=True)


def test_a_newer_format_is_refused(run):
    begin(run)
    facts = json.loads(run.facts.read_text())
    run.facts.write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(RunError, match="format 2; this version reads up to 1: update h2tune-jax"):
        begin(run, resume=True)


def test_a_folder_of_something_else_is_left_alone(run):
    (run.path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"holds something that is no run \(thesis.tex\)"):
        begin(run, resume=True)
    assert not run.facts.exists()


def test_damaged_facts_are_said(run):
    begin(run)
    run.facts.write_text("{")
    with pytest.raises(RunError, match=r"run.json cannot be read"):
        read_facts(run)
    run.facts.write_text("[]")
    with pytest.raises(RunError, match=r"no run.json: it has no format"):
        read_facts(run)
    run.facts.unlink()
    with pytest.raises(RunError, match=r"holds no run: run.json is missing"):
        read_facts(run)


def test_going_on_with_other_versions_is_said(run, monkeypatch):
    begin(run)
    now = folders.circumstances()
    changed = {**now, "versions": {**now["versions"], "jax": "99"}, "device": "1 x abacus"}
    monkeypatch.setattr(folders, "circumstances", lambda: changed)
    (said,) = begin(run, resume=True)
    assert "may differ in the last bits" in said
    assert "-> 99; device" in said


def test_a_kill_before_the_facts_are_written_does_no_harm(run):
    run.config.write_text("half")
    (run.path / ".run.json.part").write_text("{")
    assert begin(run) == []
    assert run.config.read_text() == CONFIG


HOLD = """
import sys, time
from h2tune_jax.run.folder import RunFolder, lock_folder
from pathlib import Path
with lock_folder(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_is_dead(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=f"is being written by process {holder.pid} on "),
            lock_folder(folder),
        ):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        time.sleep(0.01)
        with lock_folder(folder):
            assert f"process {os.getpid()}" in folder.lock.read_text()
    assert folder.lock.read_text() == ""


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = RunFolder(tmp_path / "file" / "run")
    with (
        pytest.raises(RunError, match=r"the run cannot be written to .*: Not a directory"),
        lock_folder(folder),
    ):
        pass


def test_a_read_only_folder_is_said(run, monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folders, "write_whole", refuse)
    with pytest.raises(
        RunError, match=r"the run cannot be written to .*: Permission denied; choose another"
    ):
        begin(run)
    assert not run.facts.exists()

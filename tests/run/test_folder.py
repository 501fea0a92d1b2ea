"""The run's folder: whose it is, who writes, and what is refused."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from h2tune_jax.run import folder as folders
from h2tune_jax.run.disk import make_folder, sync_path, whole_folder, write_whole
from h2tune_jax.run.folder import (
    RunError,
    RunFolder,
    begin_folder,
    data_digest,
    is_live,
    lock_folder,
    note_data,
    read_facts,
)
from h2tune_jax.types import ClientData

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


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ("abc", "def", ["commit abc -> def"]),
        ("abc", "abc+", ["commit abc -> abc+"]),
        ("abc", "abc", []),
        (None, "abc", []),  # of a copy that was installed nobody knows the commit
    ],
)
def test_going_on_with_another_commit_is_said(run, monkeypatch, before, now, said):
    current = folders.circumstances()
    for resume, commit in ((False, before), (True, now)):
        monkeypatch.setattr(
            folders, "circumstances", lambda commit=commit: {**current, "commit": commit}
        )
        told = begin(run, resume=resume)
    assert [text.partition("last bits: ")[2] for text in told] == said


def group(held, room=None):
    """Three clients that hold so many examples of twelve bytes each."""
    room = held if room is None else room
    x = np.arange(room * 6, dtype=np.float32).reshape(3, room, 2)
    y = np.arange(room * 3, dtype=np.int32).reshape(3, room)
    return ClientData({"x": x, "y": y}, np.full(3, held, np.int32))


def test_data_that_has_changed_is_refused_and_the_group_is_named(run):
    begin(run)
    before = read_facts(run)
    note_data(run, {"narrow": group(5), "wide": group(3, room=4)})
    facts = read_facts(run)
    assert {**before, "data": facts["data"]} == facts
    assert facts["data"].keys() == {"narrow", "wide"}
    same, flipped, moved = group(3, room=4), group(3, room=4), group(3, room=4)
    same.examples["y"][2, 3] += 1  # what nobody holds is nobody's data
    note_data(run, {"narrow": group(5), "wide": same})
    flipped.examples["y"][2, 2] += 1
    moved.examples["x"][:] = moved.examples["x"][::-1]
    for other in (flipped, moved, group(2, room=4), group(4)):
        with pytest.raises(RunError, match=r"training data than now \(group wide\)\. Give it"):
            note_data(run, {"narrow": group(5), "wide": other})
    assert read_facts(run) == facts


def test_of_large_data_a_sample_of_examples_is_read(monkeypatch):
    monkeypatch.setattr(folders, "DATA_BYTES", 3 * 8 * 12 // 4)
    whole, seen, unseen = group(8), group(8), group(8)
    seen.examples["y"][2, 4] += 1  # of the 24 examples, one after the other, every fourth
    unseen.examples["y"][2, 5] += 1
    assert data_digest(whole) == data_digest(unseen) != data_digest(seen)
    monkeypatch.undo()
    assert len({data_digest(data) for data in (whole, seen, unseen)}) == 3


def test_a_kill_before_the_facts_are_written_does_no_harm(run):
    run.config.write_text(CONFIG)
    (run.path / ".run.json.part").write_text("{")
    assert begin(run) == []
    assert run.config.read_text() == CONFIG


def test_somebody_elses_config_is_left_as_it_is(run):
    run.config.write_text("mine")
    with pytest.raises(RunError, match=r"config.toml is there already, with another config than"):
        begin(run)
    assert run.config.read_text() == "mine"


def test_a_folder_of_something_else_gets_no_lock(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with (
        pytest.raises(RunError, match=r"holds something that is no run \(thesis.tex\)"),
        lock_folder(RunFolder(tmp_path)),
    ):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("held", [b"of my own\n", b"process 7 on host\nof my own\n", b"x" * 5000])
def test_somebody_elses_lock_is_left_as_it_is(tmp_path, held):
    (tmp_path / "lock").write_bytes(held)
    with (
        pytest.raises(RunError, match="lock is no lock of a run, and was left as it is"),
        lock_folder(RunFolder(tmp_path)),
    ):
        pass
    assert (tmp_path / "lock").read_bytes() == held


@pytest.mark.parametrize("held", [b"", b"process 7 on host\n", b"process 7 on ho", bytes(30)])
def test_a_lock_that_a_dead_process_left_is_ours(tmp_path, held):
    folder = RunFolder(tmp_path)
    folder.lock.write_bytes(held)
    assert not is_live(folder)
    with lock_folder(folder):
        assert folder.lock.read_text().startswith(f"process {os.getpid()} on ")
        assert is_live(folder)
    assert not is_live(folder)


def test_who_looks_at_a_run_keeps_nobody_from_it(tmp_path):
    """The look holds the lock for a moment, in which a writer waits."""
    folder = RunFolder(tmp_path)
    with folder.lock.open("a+b") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        timer = threading.Timer(0.06, fcntl.flock, (looking, fcntl.LOCK_UN))
        timer.start()
        with lock_folder(folder):
            pass
        timer.join()


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


def test_facts_that_the_machine_refuses_are_not_missing(run, monkeypatch):
    begin(run)

    def refuse(path, **options):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(
        RunError, match=r"the run cannot be read from .*: Input/output error; nothing"
    ):
        begin(run, resume=True)


# What lies on the disk


def synced(monkeypatch):
    """The places that are made to outlast a power cut, as they come."""
    places, real = [], os.fsync

    def fsync(handle):
        places.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return places


def test_folders_and_files_are_in_the_folder_above_when_they_are_said_to_be(tmp_path, monkeypatch):
    places = synced(monkeypatch)
    make_folder(tmp_path / "a" / "b")
    assert places == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b")
    write_whole(tmp_path / "a" / "file", "x")
    assert places[2:] == [tmp_path / "a" / ".file.part", tmp_path / "a"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_without_such_a_call_is_no_error(tmp_path, monkeypatch, code):
    def fsync(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output error"):
            sync_path(tmp_path)
    else:
        sync_path(tmp_path)


def write_half(folder):
    with whole_folder(folder) as part:
        (part / "one").write_text("half")
        raise ZeroDivisionError


def test_a_folder_is_written_in_full_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        write_half(out)
    assert os.listdir(tmp_path) == []
    places = synced(monkeypatch)
    with whole_folder(out) as part:
        (part / "deep").mkdir()
        (part / "deep" / "one").write_text("1")
        assert not out.exists()
    assert (out / "deep" / "one").read_text() == "1"
    assert {part / "deep" / "one", part / "deep", part} <= set(places)
    assert places[-1] == tmp_path


def test_what_a_folder_holds_beside_stays(tmp_path):
    (tmp_path / "one").write_text("old")
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path)
    assert (tmp_path / "one").read_text() == "old"
    with whole_folder(tmp_path) as part:
        (part / "one").write_text("new")
        (part / "deep").mkdir()
        (part / "deep" / "two").write_text("2")
    assert sorted(os.listdir(tmp_path)) == ["deep", "mine", "one"]
    assert (tmp_path / "one").read_text() == "new"
    assert (tmp_path / "mine").read_text() == "mine"

"""Runs that are killed, and runs whose files are damaged, end as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import crash_child
import pytest
import toy_run

from h2tune_jax.run import checkpoint
from h2tune_jax.run.events import Notice
from h2tune_jax.run.inspect import inspect_run
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.records import read_lines
from h2tune_jax.run.report.arrays import read_inside
from h2tune_jax.run.report.view import read_view

CHILD = Path(crash_child.__file__)


class Killer:
    """Runs the child again and again, killing it by the clock or having it kill itself."""

    def __init__(self, out, store, rounds, cache, seed):
        self.args = [sys.executable, str(CHILD), str(out), store, str(rounds), str(cache)]
        self.random = random.Random(seed)
        self.kills = {"clock": 0, "disk": 0}
        self.last = 0  # the last round that a killed child had told

    def run_once(self, how):
        """Run the child; -> its last line if it came to its end."""
        args = list(self.args)
        if how == "disk":
            args.append(str(self.random.randint(1, 60)))
        with subprocess.Popen(
            args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            rounds, target, lines = 0, self.random.randint(0, 4), []
            for line in child.stdout:
                lines.append(line)
                assert not line.startswith("warning"), line
                rounds += line.startswith("round")
                if how == "clock" and rounds >= target:
                    time.sleep(self.random.uniform(0, 0.05))
                    child.kill()
                    break
            errors = child.stderr.read()
            code = child.wait()
        if code == -signal.SIGKILL:
            self.kills[how] += 1
            return None
        assert code == 0, errors
        return lines[-1].split()[1]

    def run_until_done(self, kills):
        """Kill it so often, then let it end."""
        while sum(self.kills.values()) < kills:
            how = self.random.choice(("clock", "disk"))
            digest = self.run_once(how)
            if digest is not None:
                return digest
        return self.run_once("never")


def straight(tmp_path, store, rounds):
    out = tmp_path / "straight"
    args = [sys.executable, str(CHILD), str(out), store, str(rounds), str(tmp_path / "cache")]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout.split()[-1]


def killed_as_straight(tmp_path, store, rounds, kills, seed):
    expected, digest = straight(tmp_path, store, rounds)
    killer = Killer(tmp_path / "killed", store, rounds, tmp_path / "cache", seed)
    assert killer.run_until_done(kills) == digest
    log = (tmp_path / "killed" / "metrics.jsonl").read_bytes()
    assert log == (expected / "metrics.jsonl").read_bytes()
    for name in ("metrics.jsonl", "timings.jsonl"):
        told = [line["round"] for line in read_lines(tmp_path / "killed" / name)]
        assert told == list(range(rounds))
    assert crash_child.final_digest(tmp_path / "killed") == digest
    assert all(ok for _, ok, _ in checkpoint.verify(tmp_path / "killed"))
    left = [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in left)
    return killer.kills


def test_a_run_that_is_killed_ends_the_same(tmp_path):
    assert sum(killed_as_straight(tmp_path, "file", 8, 1, seed=2).values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("store", ["device", "host", "file"])
def test_a_run_that_is_killed_thirty_times_ends_the_same(tmp_path, store):
    kills = killed_as_straight(tmp_path, store, 150, 30, seed=5)
    assert sum(kills.values()) == 30
    assert min(kills.values()) >= 5, kills


@pytest.mark.slow
@pytest.mark.parametrize("store", ["device", "file"])
def test_a_run_under_way_can_be_read_at_any_moment(tmp_path, store):
    """It keeps two checkpoints and the rows that they need, and deletes the others as it goes."""
    out = tmp_path / "run"
    args = [sys.executable, str(CHILD), str(out), store, "150", str(tmp_path / "cache")]
    live = read = 0
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            if not checkpoint.steps(out):
                time.sleep(0.01)
                continue
            found = inspect_run(out)
            live += found.is_running
            assert found.damage == ""
            assert all(line.verifies for line in found.checkpoints), found.checkpoints
            inside, view = read_inside(out, 1), read_view(out)
            assert [line["round"] for line in view.records] == list(range(len(view.records)))
            assert len(view.records) >= inside.rounds
            assert len(inside.clients[0])
            read += 1
        assert child.returncode == 0, child.stderr.read() if child.stderr else ""
    assert live >= 5
    assert read >= 5
    assert all(ok for _, ok, _ in checkpoint.verify(out))


HOW = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "flipped": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
    "deleted": None,
}


@pytest.mark.parametrize("store", [pytest.param("device", marks=pytest.mark.slow), "file"])
def test_damage_to_any_file_of_the_newest_checkpoint_changes_nothing_in_the_end(tmp_path, store):
    """The run is cut short after round 4 of 6, damaged, and gone on with."""
    config, federation = crash_child.settings(store, 6), crash_child.federation()
    method = toy_run.method()
    programs = Programs(method, federation.specs, federation.bases, None, config)

    def run(out, **options):
        told = []
        toy_run.run(
            out, config, method=method, federation=federation, programs=programs,
            observers=[told.append], **options,
        )  # fmt: skip
        notices = [event.text for event in told if isinstance(event, Notice)]
        return crash_child.final_digest(out), (out / "metrics.jsonl").read_bytes(), notices

    digest, log, _ = run(tmp_path / "straight")
    asked = iter([False] * 4 + [True])
    run(tmp_path / "cut", stop_request=lambda: next(asked))
    assert checkpoint.steps(tmp_path / "cut") == [2, 4]
    newest = tmp_path / "cut" / "checkpoints" / "000004"
    before = set(checkpoint.read_manifest(tmp_path / "cut", 2)["beside"])
    beside = set(checkpoint.read_manifest(tmp_path / "cut", 4)["beside"]) - before
    assert bool(beside) == (store == "file")
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    files += [tmp_path / "cut" / name for name in beside]
    assert len(files) > 5
    for file in files:
        for how, change in HOW.items():
            out = tmp_path / "damaged"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(tmp_path / "cut", out)
            victim = out / file.relative_to(tmp_path / "cut")
            data = victim.read_bytes()
            if change is None:
                victim.unlink()
            else:
                victim.write_bytes(change(data))
                if victim.read_bytes() == data:
                    continue  # an empty file stays empty
            found, found_log, notices = run(out)
            assert (found, found_log) == (digest, log), (file, how)
            assert "round 4 does not verify" in notices[0], (file, how)
            assert notices[-1] == "goes on from the checkpoint of round 2", (file, how)
            assert os.listdir(out / "checkpoints")

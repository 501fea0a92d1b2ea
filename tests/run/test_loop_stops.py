"""How a run stops (on request, early, for what went wrong), and that it goes on as if nothing had been."""

import contextlib
import errno
import os
import subprocess

import pytest
import toy
import toy_run
from run_folders import fill, small_disk
from toy_run import run_with as run

from h2tune_jax.run import checkpoint, stopping, write_checkpoint
from h2tune_jax.run.disk import holding
from h2tune_jax.run.events import Finished, Notice, Started
from h2tune_jax.run.folder import RunError, RunFolder, lock_folder
from h2tune_jax.run.loop import drive, has_stalled, make_rounds, run_one
from h2tune_jax.run.notices import read_notices
from h2tune_jax.run.records import read_lines
from h2tune_jax.run.settings import StopConfig
from h2tune_jax.run.worker import Worker

programs = pytest.fixture(toy_run.programs, scope="module")


def test_a_run_stops_early_and_stays_stopped(programs, tmp_path):
    """Nothing gains 0.9 of accuracy: the first test is the best, and two more are waited for."""
    config = toy_run.config(6, stop={"patience": 2, "min_delta": 0.9})
    result = run(programs, tmp_path / "run", config)
    assert (result.reason, len(result.records)) == ("early stop", 3)
    assert checkpoint.steps(tmp_path / "run")[-1] == 3
    again = run(programs, tmp_path / "run", config)
    assert (again.reason, len(again.records)) == ("early stop", 3)
    toy.assert_trees_equal(again.state, result.state)


def test_a_test_is_scored_once_however_many_come_after_it(programs, tmp_path, monkeypatch):
    """All of them were scored again at every test."""
    scored, real = [], stopping.score

    def watch(record, *args):
        scored.append(record["round"])
        return real(record, *args)

    monkeypatch.setattr(stopping, "score", watch)
    stop, asked = {"patience": 9}, iter([False] * 3 + [True])
    config = toy_run.config(5, stop=stop, evaluation={"batch_size": 4, "before": True})
    run(programs, tmp_path / "run", config, stop_request=lambda: next(asked))
    assert scored == [-1, 0, 1, 2]
    run(programs, tmp_path / "run", config)
    assert scored == [-1, 0, 1, 2, -1, 0, 1, 2, 3, 4]


def test_stalling_counts_tests_without_enough_gain():
    stop = StopConfig(patience=2, min_delta=0.1)
    assert not has_stalled([], stop)
    assert not has_stalled([0.5, 0.55], stop)
    assert has_stalled([0.5, 0.55, 0.59], stop)
    assert not has_stalled([0.5, 0.55, 0.61, 0.65], stop)
    assert has_stalled([0.5, None, None], stop)
    falling = StopConfig(metric="loss", mode="min", patience=1)
    assert not has_stalled([2.0, 1.0], falling)
    assert has_stalled([2.0, 1.0, 1.0], falling)


def test_a_finished_run_is_finished(programs, tmp_path):
    first = run(programs, tmp_path / "run")
    told = []
    again = run(programs, tmp_path / "run", observers=[told.append])
    assert [type(event) for event in told] == [Started, Finished]
    assert again.records == first.records
    toy.assert_trees_equal(again.state, first.state)


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(programs, tmp_path, rounds):
    config, asked, told = (
        toy_run.config(checkpoints={"every": 3}),
        iter([False] * rounds + [True]),
        [],
    )
    result = run(
        programs,
        tmp_path / "run",
        config,
        stop_request=lambda: next(asked),
        observers=[told.append],
    )
    assert (result.reason, len(result.records)) == ("interrupted", rounds)
    assert checkpoint.steps(tmp_path / "run") == ([rounds] if rounds else [])
    (notice,) = [event for event in told if isinstance(event, Notice)]
    folder = tmp_path / "run"
    assert notice.text.endswith(
        f"go on with: h2tune run {folder}/config.toml --out {folder} --resume"
    )
    whole, straight = run(programs, tmp_path / "run", config), run(programs, None, config)
    assert whole.records == straight.records
    toy.assert_trees_equal(whole.state, straight.state)


def test_damage_is_told_and_the_round_before_is_gone_on_from(programs, tmp_path):
    whole = run(programs, tmp_path / "run")
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    manifest = tmp_path / "run" / "checkpoints" / "000004" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    told = []
    again = run(programs, tmp_path / "run", observers=[told.append])
    texts = [event.text for event in told if isinstance(event, Notice)]
    assert "the checkpoint of round 4 does not verify (manifest.json cannot be read" in texts[0]
    assert texts[1:] == ["goes on from the checkpoint of round 3"]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == log
    toy.assert_trees_equal(again.state, whole.state)
    assert [ok for _, ok, _ in checkpoint.verify(tmp_path / "run")] == [True] * 3


def give_up(programs, out, config, at_most, rounds):
    """Go on from `at_most` as a set of seeds would, and be interrupted after so many rounds."""
    asked, folder = iter([False] * rounds + [True]), RunFolder(out)
    with lock_folder(folder), contextlib.closing(Worker()) as worker:
        stops = lambda index: next(asked)
        made = make_rounds(
            toy_run.federation(), config, programs, worker, folder, (), stops, at_most
        )
        with contextlib.closing(made):
            (result,) = drive([made.steps()], lambda calls: {0: run_one(programs, calls[0])})
            worker.close()
    return result


def test_a_checkpoint_that_is_given_up_counts_no_more_though_somebody_reads_it(programs, tmp_path):
    """It was taken for the newest: an interrupt saved nothing, and it vouched for lines that were gone."""
    config, out = toy_run.config(checkpoints={"every": 2}), tmp_path / "run"
    asked = iter([False] * 2 + [True])
    run(programs, out, config, stop_request=lambda: next(asked))
    with holding(out / "checkpoints" / "000002", alone=False) as is_free:
        assert is_free
        result = give_up(programs, out, config, at_most=0, rounds=1)
        assert (result.reason, len(result.records)) == ("interrupted", 1)
        assert checkpoint.verify(out) == [(1, True, "")]
        whole = run(programs, out, config)
    assert whole.records == run(programs, None, config).records
    assert sorted(os.listdir(out / "checkpoints")) == ["000001", "000002", "000004"]


def tree_of(folder):
    """Every file of a run and what it holds, but for the lock and the notices."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("lock", "notices.jsonl")
    }


def test_a_run_does_not_go_on_with_other_data(programs, tmp_path):
    """As if nothing had happened: its config named the same file."""
    out, asked = tmp_path / "run", iter([False] * 2 + [True])
    run(programs, out, stop_request=lambda: next(asked))
    before, changed = tree_of(out), toy_run.federation()
    changed.train[1].examples["x"][2, 0] += 1
    with pytest.raises(RunError, match=r"other training data than now \(group wide\)"):
        run(programs, out, federation=changed)
    assert tree_of(out) == before
    assert run(programs, out).records == run(programs, None).records


@pytest.mark.parametrize("kind", ["device", "file"])
def test_without_any_good_checkpoint_nothing_is_begun_anew_unasked(programs, tmp_path, kind):
    config, out = toy_run.config(store={"kind": kind}), tmp_path / "run"
    whole = run(programs, out, config)
    assert (out / "clients").exists() == (kind == "file")
    (out / "metrics.jsonl").unlink()
    before = tree_of(out)
    with pytest.raises(
        RunError, match=r"none of them verifies: .*metrics.jsonl is missing"
    ) as error:
        run(programs, out, config)
    assert f"move {out / 'checkpoints'} away and resume" in str(error.value)
    assert tree_of(out) == before
    # As it says.
    (out / "checkpoints").rename(tmp_path / "away")
    again = run(programs, out, config)
    assert again.records == whole.records == read_lines(out / "metrics.jsonl")
    assert len(read_lines(out / "timings.jsonl")) == 4
    (notice,) = read_notices(RunFolder(out))
    assert notice["text"] == "has no checkpoint to go on from: begins again with the first round"


PASSING = {
    "file_digest": OSError(errno.EMFILE, "Too many open files"),
    "restore_arrays": MemoryError(),
    "read_manifest": RunError("refused"),
}


@pytest.mark.parametrize("place", PASSING)
def test_what_the_machine_refuses_stops_a_resumed_run_and_costs_nothing(
    programs, tmp_path, monkeypatch, place
):
    """It was taken for damage, of which every checkpoint had some."""
    out, asked = tmp_path / "run", iter([False] * 2 + [True])
    config = toy_run.config(store={"kind": "file"})
    run(programs, out, config, stop_request=lambda: next(asked))
    before = tree_of(out)

    def refuse(*args, **options):
        raise PASSING[place]

    monkeypatch.setattr(checkpoint, place, refuse)
    with pytest.raises(RunError, match=r"Too many open files|out of memory|refused"):
        run(programs, out, config)
    monkeypatch.undo()
    assert tree_of(out) == before
    assert run(programs, out, config).records == run(programs, None).records


def test_what_a_reader_should_know_stands_in_the_folder_and_on_standard_error(
    programs, tmp_path, capsys
):
    """Whoever observes: a run that nobody watches says it as well, and none is cut off on resume."""
    out = tmp_path / "run"
    for rounds in (2, 1):
        asked = iter([False] * rounds + [True])
        run(programs, out, stop_request=lambda asked=asked: next(asked))
    (out / "checkpoints" / ".writing-000004").mkdir()
    manifest = out / "checkpoints" / "000003" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    run(programs, out)
    command = f"go on with: h2tune run {out}/config.toml --out {out} --resume"
    noted = read_notices(RunFolder(out))
    broken = noted[4]["text"]
    assert broken.startswith("the checkpoint of round 3 does not verify (manifest.json cannot be")
    assert broken.endswith("; it was set aside as broken-000003")
    assert [(line["level"], line["text"]) for line in noted] == [
        ("info", f"interrupted after 2 rounds; {command}"),
        ("info", "goes on from the checkpoint of round 2"),
        ("info", f"interrupted after 3 rounds; {command}"),
        ("info", "the checkpoint of round 4 was being written when the run ended; it is left out"),
        ("warning", broken),
        ("info", "goes on from the checkpoint of round 2"),
    ]
    marks = {"info": "", "warning": "warning: "}
    lines = [f"h2tune: {out}: {marks[line['level']]}{line['text']}" for line in noted]
    printed = capsys.readouterr().err.splitlines()
    assert [line for line in printed if line.startswith("h2tune: ")] == lines
    # A finished run that is opened again is left as it is.
    before = (out / "notices.jsonl").read_bytes()
    run(programs, out)
    assert (out / "notices.jsonl").read_bytes() == before


def test_a_checkpoint_of_another_config_is_refused_and_left_alone(programs, tmp_path):
    run(programs, tmp_path / "one")
    run(programs, tmp_path / "two", toy_run.config(5))
    (tmp_path / "one" / "checkpoints").rename(tmp_path / "kept")
    (tmp_path / "two" / "checkpoints").rename(tmp_path / "one" / "checkpoints")
    before = (tmp_path / "one" / "metrics.jsonl").read_bytes()
    with pytest.raises(
        RunError, match="a checkpoint of another config; resume the run with its own"
    ):
        run(programs, tmp_path / "one")
    assert checkpoint.steps(tmp_path / "one") == [3, 4, 5]
    assert (tmp_path / "one" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["device", "file"])
def test_a_full_disk_stops_the_run_and_costs_nothing(programs, tmp_path, kind):
    config = toy_run.config(12, store={"kind": kind}, checkpoints={"keep_last": 2, "keep_best": 0})
    with small_disk(tmp_path / "disk", "1m"):
        out = tmp_path / "disk" / "run"
        asked = iter([False] * 3 + [True])
        run(programs, out, config, stop_request=lambda: next(asked))
        others = out.parent / "somebody else's"
        fill(others)
        with pytest.raises(
            RunError, match=r"cannot be written to .*: No space left on device; make room"
        ):
            run(programs, out, config)
        assert all(ok for _, ok, _ in checkpoint.verify(out))
        assert checkpoint.steps(out)[-1] == 3
        others.unlink()
        result = run(programs, out, config)
    assert result.records == run(programs, None, toy_run.config(12)).records


def test_a_read_only_disk_can_be_read_and_is_said_to_be_one(programs, tmp_path):
    with small_disk(tmp_path / "disk", "4m"):
        out = tmp_path / "disk" / "run"
        asked = iter([False] * 2 + [True])
        run(programs, out, stop_request=lambda: next(asked))
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        for folder in (out, tmp_path / "disk" / "new"):
            with pytest.raises(
                RunError, match=r"the run cannot be written to .*: Read-only file system"
            ):
                run(programs, folder)
        assert checkpoint.verify(out) == [(1, True, ""), (2, True, "")]


def test_a_folder_that_turns_read_only_stops_the_run(programs, tmp_path, monkeypatch):
    real = write_checkpoint.save_arrays

    def refuse(path, arrays):
        if path.parent.name == ".writing-000003":
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        real(path, arrays)

    monkeypatch.setattr(write_checkpoint, "save_arrays", refuse)
    with pytest.raises(
        RunError, match=r"the checkpoint of round 3 cannot be written .*: Read-only file"
    ):
        run(programs, tmp_path / "run")
    assert checkpoint.verify(tmp_path / "run") == [(1, True, ""), (2, True, "")]
    monkeypatch.undo()
    assert run(programs, tmp_path / "run").records == run(programs, None).records

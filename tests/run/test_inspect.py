import io

import numpy as np
import pytest
from rich.console import Console
from run_folders import save_arrays, write_run

from h2tune_jax.run import checkpoint, inspect, write_checkpoint
from h2tune_jax.run.events import Notice
from h2tune_jax.run.folder import RunError, RunFolder, lock_folder
from h2tune_jax.run.inspect import inspect_run, inspection_view
from h2tune_jax.run.notices import announce


def shown(found):
    console = Console(file=io.StringIO(), width=120)
    console.print(inspection_view(found))
    return console.file.getvalue()


def test_inspect_says_which_checkpoints_verify(tmp_path):
    folder = write_run(tmp_path / "run", rounds=4, name="[bold]demo")
    for step in (2, 4):
        save_arrays(folder, {".round": np.asarray(step)}, step)
    manifest = folder / "checkpoints" / "000004" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 4', '"step": 5'))
    found = inspect_run(folder)
    assert [(line.rounds, line.verifies) for line in found.checkpoints] == [(2, True), (4, False)]
    assert found.checkpoints[0].size > 0
    assert (found.rounds, found.planned, found.is_running) == (4, 4, False)
    assert found.groups[0][:4] == ("minilm", "trec", 2, "accuracy")
    assert found.sizes["metrics.jsonl"] == (folder / "metrics.jsonl").stat().st_size
    text = shown(found)
    for part in ("[bold]demo", "manifest.json is not what was written", "4 of 4 rounds", "jax",
                 "not running", "0.10.2"):  # fmt: skip
        assert part in text


def test_inspect_of_a_running_run(tmp_path):
    folder = write_run(tmp_path / "run")
    with lock_folder(RunFolder(folder)):
        assert inspect_run(folder).is_running
    assert not inspect_run(folder).is_running
    # What a killed process left in the lock file is no lock.
    (folder / "lock").write_text("process 1 on host\n")
    assert not inspect_run(folder).is_running


def test_inspect_without_checkpoints_or_rounds(tmp_path):
    folder = write_run(tmp_path / "run", rounds=0)
    assert "no checkpoints" in shown(inspect_run(folder))


def test_inspect_refuses_what_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"holds no run: run\.json is missing"):
        inspect_run(tmp_path)


def test_inspect_lists_what_was_set_aside_and_what_was_noted(tmp_path):
    folder = write_run(tmp_path / "run")
    for step in (4, 6):
        save_arrays(folder, {".round": np.asarray(step)}, step)
    assert write_checkpoint.set_aside(RunFolder(folder), 6) == "broken-000006"
    for i in range(inspect.MOST_NOTICES + 3):
        announce(RunFolder(folder), (), Notice(f"[b]notice {i}.", "warning"))
    found = inspect_run(folder)
    assert [line.rounds for line in found.checkpoints] == [4]
    assert list(found.set_aside) == ["broken-000006"]
    assert found.set_aside["broken-000006"] > 0
    assert len(found.notices) == inspect.MOST_NOTICES + 3
    text = shown(found)
    for part in ("broken-000006", "no: set aside when the run was resumed", "last 20 of 23 notices",
                 "[b]notice 3.", "[b]notice 22."):  # fmt: skip
        assert part in text
    assert "[b]notice 2." not in text


def test_inspect_of_a_damaged_log(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([lines[0], "{\n", *lines[2:]]))
    found = inspect_run(folder)
    assert found.rounds == 1
    assert "line 2 of metrics.jsonl is damaged" in shown(found)


def test_inspect_of_a_run_that_deletes_meanwhile(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    for step in (4, 6):
        save_arrays(folder, {".round": np.asarray(step)}, step)
    real = checkpoint.verify

    def verify(paths):
        found = real(paths)
        write_checkpoint.prune(paths, [6])
        return found

    monkeypatch.setattr(checkpoint, "verify", verify)
    found = inspect_run(folder)
    assert [(line.rounds, line.size > 0) for line in found.checkpoints] == [(6, True)]

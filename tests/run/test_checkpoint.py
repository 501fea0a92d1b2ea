"""Checkpoints: what comes back, what is noticed, and what a full disk leaves."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from run_folders import small_disk

from h2tune_jax.run import checkpoint, disk, write_checkpoint
from h2tune_jax.run.flat import json_digest
from h2tune_jax.run.folder import RunError, RunFolder
from h2tune_jax.run.records import Mark
from h2tune_jax.types import RoundState


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        ".server.middle": rng.normal(size=(3, 2)).astype(np.float32),
        ".clients[0].a['q/b.c']": rng.normal(size=(2, 4)).astype(jnp.bfloat16),
        ".clients[0].trained": np.asarray([True, False]),
        ".clients[0].none": np.zeros((0, 5), np.int32),
        ".clients[0].none16": np.zeros((2, 0), jnp.bfloat16),
        ".count": np.asarray(7, np.int32),
        ".nan": np.asarray([np.nan, -0.0, np.inf], np.float16),
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value.dtype == other[path].dtype, path
        assert value.shape == other[path].shape, path
        assert value.tobytes() == other[path].tobytes(), path


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "deleted":
        path.unlink()
    else:
        place = len(data) // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


HOW = ("truncated", "emptied", "deleted", "flipped")


def test_every_kind_of_array_comes_back_bit_for_bit(folder):
    size = write_checkpoint.save(folder, 3, arrays(), {"metric": 0.1})
    assert size > 0
    found, meta = checkpoint.read_arrays(folder.path)
    assert_same(found, arrays())
    assert meta == {"metric": 0.1, "round": 3}


@pytest.mark.parametrize("held", [{}, {".none": np.zeros((0, 2), np.float32)}])
def test_a_state_without_elements_is_a_checkpoint_too(folder, held):
    write_checkpoint.save(folder, 1, held, {})
    assert_same(checkpoint.read_arrays(folder)[0], held)


def test_the_newest_counts_and_a_step_can_be_named(folder):
    for step in (2, 10, 9):
        write_checkpoint.save(folder, step, arrays(step), {})
    assert checkpoint.steps(folder) == [2, 9, 10]
    assert_same(checkpoint.read_arrays(folder)[0], arrays(10))
    assert_same(checkpoint.read_arrays(folder, 2)[0], arrays(2))
    with pytest.raises(RunError, match="that can be read: the checkpoint of round 5 is not there"):
        checkpoint.read_arrays(folder, 5)


def test_a_round_has_one_name_and_other_spellings_are_no_checkpoints(folder):
    """A step with two names was looked for under the one that was not there."""
    for step in (1, 2, 1_234_567):
        write_checkpoint.save(folder, step, arrays(step), {})
    shutil.copytree(folder.checkpoints / "000001", folder.checkpoints / "0000001")
    (folder.checkpoints / "000002").rename(folder.checkpoints / "0000002")
    assert checkpoint.steps(folder) == [1, 1_234_567]
    assert write_checkpoint.prune(folder, [1]) == set()
    assert_same(checkpoint.read_arrays(folder)[0], arrays(1))
    assert write_checkpoint.prune(folder, []) == set()
    assert sorted(os.listdir(folder.checkpoints)) == ["0000001", "0000002"]


@pytest.mark.parametrize("how", HOW)
def test_damage_to_any_file_is_noticed_and_the_one_before_is_read(folder, how):
    write_checkpoint.save(folder, 1, arrays(1), {})
    write_checkpoint.save(folder, 2, arrays(2), {})
    newest = folder.checkpoints / "000002"
    backup = folder.path / "backup"
    shutil.copytree(newest, backup)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    assert len(files) > 4
    for file in files:
        if how != "deleted" and not file.stat().st_size:
            continue
        damage(file, how)
        (one, ok_one, _), (two, ok_two, reason) = checkpoint.verify(folder)
        assert (one, ok_one, two, ok_two) == (1, True, 2, False), file
        assert file.name in reason
        found, skipped = checkpoint.restore_newest(folder)
        assert found is not None
        assert found.step == 1
        assert_same(found.arrays, arrays(1))
        assert "round 2 does not verify" in skipped[0]
        shutil.rmtree(newest)
        shutil.copytree(backup, newest)
    assert checkpoint.verify(folder)[1] == (2, True, "")


def test_arrays_are_judged_by_digests_of_their_own(folder, monkeypatch):
    """Whatever Orbax gives back: files that are whole do not vouch for it."""
    write_checkpoint.save(folder, 1, arrays(), {})
    read = checkpoint.restore_arrays

    def flip(path, names):
        found = read(path, names)
        found[".server.middle"][0, 0] += 1e-7
        return found

    monkeypatch.setattr(checkpoint, "restore_arrays", flip)
    assert checkpoint.verify(folder) == [(1, False, ".server.middle is not what was written")]


@pytest.mark.parametrize("how", HOW)
def test_files_beside_a_checkpoint_belong_to_it(folder, how):
    folder.path.mkdir()
    log = folder.path / "metrics.jsonl"
    log.write_bytes(b"one\ntwo\n")
    marks = {"metrics.jsonl": Mark(8, checkpoint.file_digest(log))}
    write_checkpoint.save(folder, 1, arrays(), {}, marks)
    log.write_bytes(b"one\ntwo\nthree\n")
    assert checkpoint.verify(folder) == [(1, True, "")]
    damage(log, how)
    ((_, ok, reason),) = checkpoint.verify(folder)
    assert not ok
    assert "metrics.jsonl" in reason
    # Whoever wants the arrays only may have them.
    assert_same(checkpoint.read_arrays(folder)[0], arrays())


def test_a_newer_format_is_refused_not_skipped(folder):
    write_checkpoint.save(folder, 1, arrays(), {})
    write_checkpoint.save(folder, 2, arrays(), {})
    path = folder.checkpoints / "000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest["format"] = 99
    manifest["digest"] = json_digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"format 99; this version reads up to 1: update h2tune-jax"):
        checkpoint.restore_newest(folder)
    assert checkpoint.steps(folder) == [1, 2]


def test_another_configs_checkpoint_is_refused_not_skipped(folder):
    write_checkpoint.save(folder, 1, arrays(), {"config_digest": "abc"})
    with pytest.raises(RunError, match="checkpoint of another config"):
        checkpoint.restore_newest(folder, "xyz")
    assert checkpoint.verify(folder) == [(1, True, "")]


def test_state_goes_back_into_its_tree_and_nowhere_else(folder):
    state = RoundState(jnp.int32(4), {"w": jnp.ones((2, 3))}, ((), [jnp.zeros(5, jnp.bfloat16)]))
    flat = {path: np.asarray(leaf) for path, leaf in checkpoint.flatten(state).items()}
    assert set(flat) == {".round", ".server['w']", ".clients[1][0]"}
    write_checkpoint.save(folder, 4, flat, {"metric": None})
    found, meta, skipped = checkpoint.restore_state(folder.path, state)
    assert checkpoint.state_digest(found) == checkpoint.state_digest(state)
    assert (meta["round"], skipped) == (4, [])
    with pytest.raises(
        RunError, match=r"\.server\['w'\] is float32\[2, 3\], expected float32\[3, 3\]"
    ):
        checkpoint.restore_state(folder, state._replace(server={"w": jnp.ones((3, 3))}))
    with pytest.raises(RunError, match=r"no \.server\['v'\]; it is of another federation"):
        checkpoint.restore_state(folder, state._replace(server={"v": jnp.ones((3, 3))}))


def test_digests_tell_type_shape_and_path_apart():
    one = {"a": np.zeros(4, np.float32)}
    others = (
        {"b": np.zeros(4, np.float32)},
        {"a": np.zeros(4, np.int32)},
        {"a": np.zeros((2, 2), np.float32)},
        {"a": -np.zeros(4, np.float32)},
    )
    digests = {checkpoint.state_digest(tree) for tree in (one, *others)}
    assert len(digests) == 5


def test_leftovers_of_a_kill_are_no_checkpoints(folder):
    write_checkpoint.save(folder, 1, arrays(), {})
    (folder.checkpoints / ".writing-000002").mkdir()
    (folder.checkpoints / ".writing-000002" / "manifest.json").write_text("{")
    (folder.checkpoints / "broken-000003").mkdir()
    assert checkpoint.steps(folder) == [1]
    assert checkpoint.broken(folder) == ["broken-000003"]
    assert write_checkpoint.tidy(folder) == [2]
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["000001", "broken-000003"]
    write_checkpoint.save(folder, 3, arrays(), {})  # a good one takes the broken one's place
    write_checkpoint.prune(folder, [3])
    assert [path.name for path in folder.checkpoints.iterdir()] == ["000003"]


def test_a_full_disk_is_said_and_costs_nothing_that_was_there(tmp_path, capfd):
    with small_disk(tmp_path / "disk", "600k"):
        folder = RunFolder(tmp_path / "disk" / "run")
        write_checkpoint.save(folder, 1, arrays(), {})
        big = {".big": np.random.default_rng(0).integers(0, 255, 1_000_000, np.uint8)}
        with pytest.raises(
            RunError, match=r"round 2 cannot be written to .*000002: No space left"
        ) as e:
            write_checkpoint.save(folder, 2, big, {})
        assert "make room and resume" in str(e.value)
        assert [path.name for path in folder.checkpoints.iterdir()] == ["000001"]
        assert_same(checkpoint.read_arrays(folder)[0], arrays())
        write_checkpoint.save(folder, 2, arrays(2), {})  # there is room again
    assert "Traceback" not in capfd.readouterr().err


def refused(code):
    return OSError(code, os.strerror(code))


PASSING = [
    *((place, refused(code)) for place in ("read_bytes", "file_digest", "restore_arrays")
      for code in (errno.EMFILE, errno.EIO, errno.EACCES, errno.ENOMEM)),
    *((place, MemoryError()) for place in ("read_bytes", "file_digest", "restore_arrays")),
    ("restore_arrays", ValueError("RESOURCE_EXHAUSTED: [os_error_code='24']")),
    ("listdir", refused(errno.EIO)),
]  # fmt: skip


@pytest.mark.parametrize(("place", "error"), PASSING, ids=lambda value: repr(value))
def test_what_the_machine_refuses_is_an_error_and_no_damage(folder, monkeypatch, place, error):
    """It is gone as it came, and the newest checkpoint counts again."""
    write_checkpoint.save(folder, 1, arrays(1), {})
    write_checkpoint.save(folder, 2, arrays(2), {})

    def fail(*args, **options):
        raise error

    owner = {"read_bytes": Path, "listdir": os}.get(place, checkpoint)
    monkeypatch.setattr(owner, place, fail)
    for read in (checkpoint.restore_newest, checkpoint.read_newest):
        with pytest.raises(RunError, match="nothing was changed: ") as caught:
            read(folder)
        where = folder.checkpoints if place == "listdir" else folder.checkpoints / "000002"
        assert str(where) in str(caught.value)
    monkeypatch.undo()
    found, skipped = checkpoint.restore_newest(folder)
    assert found is not None
    assert (found.step, skipped) == (2, [])


def test_an_interrupt_is_no_damage(folder, monkeypatch):
    write_checkpoint.save(folder, 1, arrays(1), {})

    def interrupt(path, names):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "restore_arrays", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.restore_newest(folder)


def test_a_checkpoint_that_is_being_read_is_not_deleted_before(folder, monkeypatch):
    """By a run under way, that keeps the last few alone."""
    for step in (1, 2):
        write_checkpoint.save(folder, step, arrays(step), {})
    real, left = checkpoint.file_digest, []

    def go_on(path, size=None):
        write_checkpoint.save(folder, 3, arrays(3), {})
        left.append(write_checkpoint.prune(folder, [3]))
        return real(path, size)

    monkeypatch.setattr(checkpoint, "file_digest", go_on)
    found, skipped = checkpoint.read_newest(folder)
    assert (found.step, skipped) == (2, [])
    assert_same(found.arrays, arrays(2))
    assert left[0] == {2}
    assert checkpoint.steps(folder) == [2, 3]
    assert write_checkpoint.prune(folder, [3]) == set()
    assert checkpoint.steps(folder) == [3]


def test_a_checkpoint_that_goes_while_it_is_read_is_passed_over(folder, monkeypatch):
    """Where the file system has no locks, or somebody deletes by hand."""
    for step in (1, 2):
        write_checkpoint.save(folder, step, arrays(step), {})
    real = checkpoint.file_digest

    def go(path, size=None):
        shutil.rmtree(folder.checkpoints / "000002", ignore_errors=True)
        return real(path, size)

    monkeypatch.setattr(checkpoint, "file_digest", go)
    found, skipped = checkpoint.read_newest(folder)
    assert (found.step, skipped) == (1, [])
    monkeypatch.setattr(checkpoint, "steps", lambda folder: [1, 2])  # as they were listed before
    assert checkpoint.verify(folder) == [(1, True, "")]
    with pytest.raises(RunError, match="that can be read: the checkpoint of round 2 is not there"):
        checkpoint.read_newest(folder, 2)


def test_what_is_written_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    """Files, the folders that list them, and the folders above: in this order."""
    done = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        real_fsync(handle)

    def rename(path, target):
        done.append("renamed")
        return real_rename(path, target)

    monkeypatch.setattr(disk.os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    write_checkpoint.save(folder, 1, arrays(), {})
    before, after = done[: done.index("renamed")], done[done.index("renamed") :]
    part = folder.checkpoints / ".writing-000001"
    whole = folder.checkpoints / "000001"
    written = [part / path.relative_to(whole) for path in whole.rglob("*")]
    inner = [path for path in written if path.name != "manifest.json"]
    assert {folder.path.parent, folder.path, part, *inner} <= set(before)
    assert part / ".manifest.json.part" in before
    assert after == ["renamed", folder.checkpoints]

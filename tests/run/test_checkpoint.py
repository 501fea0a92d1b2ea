"""Checkpoints: what comes back, what is noticed, and what a full disk leaves."""

import contextlib
import json
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from h2tune_jax.run import checkpoint
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
    size = checkpoint.save(folder, 3, arrays(), {"metric": 0.1})
    assert size > 0
    found, meta = checkpoint.read_arrays(folder.path)
    assert_same(found, arrays())
    assert meta == {"metric": 0.1, "round": 3}


@pytest.mark.parametrize("held", [{}, {".none": np.zeros((0, 2), np.float32)}])
def test_a_state_without_elements_is_a_checkpoint_too(folder, held):
    checkpoint.save(folder, 1, held, {})
    assert_same(checkpoint.read_arrays(folder)[0], held)


def test_the_newest_counts_and_a_step_can_be_named(folder):
    for step in (2, 10, 9):
        checkpoint.save(folder, step, arrays(step), {})
    assert checkpoint.steps(folder) == [2, 9, 10]
    assert_same(checkpoint.read_arrays(folder)[0], arrays(10))
    assert_same(checkpoint.read_arrays(folder, 2)[0], arrays(2))
    with pytest.raises(RunError, match="has no checkpoint that can be read: round 5"):
        checkpoint.read_arrays(folder, 5)


@pytest.mark.parametrize("how", HOW)
def test_damage_to_any_file_is_noticed_and_the_one_before_is_read(folder, how):
    checkpoint.save(folder, 1, arrays(1), {})
    checkpoint.save(folder, 2, arrays(2), {})
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
    checkpoint.save(folder, 1, arrays(), {})
    read = checkpoint._orbax_restore

    def flip(path, names):
        found = read(path, names)
        found[".server.middle"][0, 0] += 1e-7
        return found

    monkeypatch.setattr(checkpoint, "_orbax_restore", flip)
    assert checkpoint.verify(folder) == [(1, False, ".server.middle is not what was written")]


@pytest.mark.parametrize("how", HOW)
def test_files_beside_a_checkpoint_belong_to_it(folder, how):
    folder.path.mkdir()
    log = folder.path / "metrics.jsonl"
    log.write_bytes(b"one\ntwo\n")
    marks = {"metrics.jsonl": Mark(8, checkpoint.file_digest(log))}
    checkpoint.save(folder, 1, arrays(), {}, marks)
    log.write_bytes(b"one\ntwo\nthree\n")
    assert checkpoint.verify(folder) == [(1, True, "")]
    damage(log, how)
    ((_, ok, reason),) = checkpoint.verify(folder)
    assert not ok
    assert "metrics.jsonl" in reason
    # Whoever wants the arrays only may have them.
    assert_same(checkpoint.read_arrays(folder)[0], arrays())


def test_a_newer_format_is_refused_not_skipped(folder):
    checkpoint.save(folder, 1, arrays(), {})
    checkpoint.save(folder, 2, arrays(), {})
    path = folder.checkpoints / "000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest["format"] = 99
    manifest["digest"] = checkpoint._json_digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"format 99; this version reads up to 1: update h2tune-jax"):
        checkpoint.restore_newest(folder)
    assert checkpoint.steps(folder) == [1, 2]


def test_another_configs_checkpoint_is_refused_not_skipped(folder):
    checkpoint.save(folder, 1, arrays(), {"config_digest": "abc"})
    with pytest.raises(RunError, match="checkpoint of another config"):
        checkpoint.restore_newest(folder, "xyz")
    assert checkpoint.verify(folder) == [(1, True, "")]


def test_state_goes_back_into_its_tree_and_nowhere_else(folder):
    state = RoundState(jnp.int32(4), {"w": jnp.ones((2, 3))}, ((), [jnp.zeros(5, jnp.bfloat16)]))
    flat = {path: np.asarray(leaf) for path, leaf in checkpoint.flatten(state).items()}
    assert set(flat) == {".round", ".server['w']", ".clients[1][0]"}
    checkpoint.save(folder, 4, flat, {"metric": None})
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
    checkpoint.save(folder, 1, arrays(), {})
    (folder.checkpoints / ".writing-000002").mkdir()
    (folder.checkpoints / ".writing-000002" / "manifest.json").write_text("{")
    (folder.checkpoints / "broken-000003").mkdir()
    assert checkpoint.steps(folder) == [1]
    checkpoint.tidy(folder)
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["000001", "broken-000003"]
    checkpoint.save(folder, 3, arrays(), {})  # a good one takes the broken one's place
    checkpoint.prune(folder, [3])
    assert [path.name for path in folder.checkpoints.iterdir()] == ["000003"]


@contextlib.contextmanager
def small_disk(path, size="600k"):
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_said_and_costs_nothing_that_was_there(tmp_path, capfd):
    with small_disk(tmp_path / "disk"):
        folder = RunFolder(tmp_path / "disk" / "run")
        checkpoint.save(folder, 1, arrays(), {})
        big = {".big": np.random.default_rng(0).integers(0, 255, 1_000_000, np.uint8)}
        with pytest.raises(
            RunError, match=r"round 2 cannot be written to .*000002: No space left"
        ) as e:
            checkpoint.save(folder, 2, big, {})
        assert "make room and resume" in str(e.value)
        assert [path.name for path in folder.checkpoints.iterdir()] == ["000001"]
        assert_same(checkpoint.read_arrays(folder)[0], arrays())
        checkpoint.save(folder, 2, arrays(2), {})  # there is room again
    assert "Traceback" not in capfd.readouterr().err

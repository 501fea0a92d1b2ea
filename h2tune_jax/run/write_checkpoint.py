"""Checkpoints written, and cleared away; `run.checkpoint` says what they are, and reads them."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from h2tune_jax.run.checkpoint import MANIFEST, checkpoint_path, steps
from h2tune_jax.run.disk import holding, make_folder, names_in, sync_path, write_whole, writing
from h2tune_jax.run.flat import array_digest, file_digest, json_digest
from h2tune_jax.run.folder import FORMAT, RunFolder
from h2tune_jax.run.orbax_arrays import save_arrays
from h2tune_jax.run.records import Mark


def save(
    folder: RunFolder,
    step: int,
    arrays: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    beside: Mapping[str, Mark] | None = None,
) -> int:
    """Write a checkpoint; it has its name only when it is whole: -> bytes written.

    Args:
      folder: the run.
      step: rounds done.
      arrays: by path. Arrays without elements are kept in the manifest: Orbax has no room for them.
      meta: further facts, as JSON.
      beside: other files of the run that belong to it, by their path below the run's folder.
    """
    final = checkpoint_path(folder, step)
    part = folder.checkpoints / f".writing-{step:06d}"
    with writing(f"the checkpoint of round {step}", final):
        try:
            make_folder(folder.checkpoints)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            full = {path: value for path, value in arrays.items() if value.size}
            if full:
                save_arrays(part / "arrays", full)
            files = {str(file.relative_to(part)): _describe_and_sync(file) for file in _files(part)}
            manifest = {
                "format": FORMAT,
                "step": step,
                "meta": dict(meta),
                "arrays": {path: _describe(value) for path, value in arrays.items()},
                "files": files,
                "beside": {path: list(mark) for path, mark in (beside or {}).items()},
            }
            for inner in part.rglob("*"):
                if inner.is_dir():
                    sync_path(inner)
            text = json.dumps({**manifest, "digest": json_digest(manifest)}, indent=1)
            write_whole(part / MANIFEST, text)
            # Bytes of a checkpoint that had this name are of no use: it did not verify, or it is this.
            _remove(final)
            part.rename(final)
            sync_path(folder.checkpoints)
            _remove(folder.checkpoints / f"broken-{step:06d}")
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # its bytes may be what fills the disk
            raise
    return sum(size for size, _ in files.values()) + len(text)


def _describe(array: np.ndarray) -> list[Any]:
    return [str(array.dtype), list(array.shape), array_digest(array)]


def _describe_and_sync(file: Path) -> list[Any]:
    sync_path(file)
    return [file.stat().st_size, file_digest(file)]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _remove(path: Path) -> None:
    """Delete a folder so that a kill leaves no half of it under its name, and what `give_up` left of it."""
    aside = _old_name(path)
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _old_name(path: Path) -> Path:
    return path.with_name(f".writing-old-{path.name}")


def prune(folder: RunFolder, keep: Iterable[int]) -> set[int]:
    """Delete every checkpoint but these, and those that somebody is reading: -> the latter."""
    kept, read = set(keep), set()
    with writing("what is left of old checkpoints", folder.checkpoints):
        for step in steps(folder):
            if step not in kept:
                with holding(checkpoint_path(folder, step), alone=True) as is_free:
                    if is_free:
                        _remove(checkpoint_path(folder, step))
                    else:
                        read.add(step)
    return read


def give_up(folder: RunFolder, given_up: Iterable[int]) -> None:
    """Take checkpoints away that the run will write again, from under whoever reads them.

    They vouch for lines of the log that are cut off next. What somebody reads loses its name alone, which
    tells him that it went; it is deleted when its round is saved again, or the run is resumed.
    """
    with writing("what is left of old checkpoints", folder.checkpoints):
        for step in given_up:
            home = checkpoint_path(folder, step)
            with holding(home, alone=True) as is_free:
                if is_free:
                    _remove(home)
                else:
                    shutil.rmtree(_old_name(home), ignore_errors=True)
                    home.rename(_old_name(home))
        sync_path(folder.checkpoints)


def tidy(folder: RunFolder) -> list[int]:
    """Delete what a killed process left unfinished: -> the rounds whose checkpoints it was writing.

    Only for the holder of the lock.
    """
    unfinished = []
    for name in names_in(folder.checkpoints):
        if name.startswith(".writing-"):
            shutil.rmtree(folder.checkpoints / name, ignore_errors=True)
            number = name.removeprefix(".writing-")
            unfinished += [int(number)] if number.isdigit() else []
    return unfinished


def set_aside(folder: RunFolder, step: int) -> str:
    """Rename a checkpoint that does not verify, so that nobody takes it for a good one: -> its name.

    It goes when a good one of its round is written.
    """
    aside = folder.checkpoints / f"broken-{step:06d}"
    with writing("the name of a broken checkpoint", aside):
        _remove(aside)
        checkpoint_path(folder, step).rename(aside)
        sync_path(folder.checkpoints)
    return aside.name

"""Checkpoints that say themselves whether they are whole.

    RUN/checkpoints/
      000012/              the run after 12 rounds
        arrays/            Orbax: a flat dict of arrays, by path
        manifest.json      what must be there, with a SHA-256 of every array and of every file
      .writing-000016/     unfinished: a name that nobody reads
      broken-000008/       did not verify when the run was resumed

Orbax gives back a flipped byte without a word, and takes a truncated checkpoint for its newest. So every
checkpoint is read against its own manifest, whose last entry is its own digest; on resume the newest that
verifies counts. A manifest also vouches for files *beside* it: the first bytes of metrics.jsonl, and
the files that hold clients' rows. `docs/checkpoints.md` is the account for users.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from h2tune_jax.run.folder import (
    FORMAT,
    RunError,
    RunFolder,
    refuse_newer,
    sync_folder,
    write_whole,
    writing,
)
from h2tune_jax.run.records import Mark
from h2tune_jax.types import PyTree

Arrays = dict[str, np.ndarray]
MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    """A checkpoint that was read and verified."""

    step: int  # rounds done
    arrays: Arrays  # by path, as `flatten` names them
    meta: dict[str, Any]


class Broken(Exception):
    """Why a checkpoint does not verify."""


# Trees and flat arrays


def flatten(tree: PyTree, prefix: str = "") -> dict[str, Any]:
    """Return a tree's leaves by path: ".server.middle", ".clients[0].a['q']"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {prefix + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def unflatten(like: PyTree, arrays: Mapping[str, np.ndarray], prefix: str = "") -> PyTree:
    """Put arrays in the places of `like` (arrays or shapes); `RunError` where they do not fit."""

    def place(path: Any, leaf: Any) -> np.ndarray:
        name = prefix + jax.tree_util.keystr(path)
        found = arrays.get(name)
        if found is None:
            raise RunError(f"the checkpoint has no {name}; it is of another federation or method")
        if found.shape != tuple(leaf.shape) or found.dtype != leaf.dtype:
            raise RunError(
                f"the checkpoint's {name} is {found.dtype}{list(found.shape)}, expected "
                f"{leaf.dtype}{list(leaf.shape)}; it is of another federation or method"
            )
        return found

    return jax.tree_util.tree_map_with_path(place, like)


def array_digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's type, shape and bytes."""
    digest = hashlib.sha256(f"{array.dtype}{list(array.shape)}".encode())
    if array.size:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def state_digest(state: PyTree) -> str:
    """Return one SHA-256 over every array of a tree and its path: equal where all bits are."""
    named = {path: array_digest(np.asarray(leaf)) for path, leaf in flatten(state).items()}
    return _json_digest(named)


def _json_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path, size: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first `size` bytes; `Broken` where it has fewer."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        while left:
            block = file.read(min(left, 1 << 22))
            if not block:
                raise Broken(f"{path.name} is shorter than it was")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


# Writing


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
    final = _path(folder, step)
    part = folder.checkpoints / f".writing-{step:06d}"
    with writing(f"the checkpoint of round {step}", final):
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            full = {path: value for path, value in arrays.items() if value.size}
            if full:
                _orbax_save(part / "arrays", full)
            files = {str(file.relative_to(part)): _describe_and_sync(file) for file in _files(part)}
            manifest = {
                "format": FORMAT,
                "step": step,
                "meta": dict(meta),
                "arrays": {path: _describe(value) for path, value in arrays.items()},
                "files": files,
                "beside": {path: list(mark) for path, mark in (beside or {}).items()},
            }
            text = json.dumps({**manifest, "digest": _json_digest(manifest)}, indent=1)
            write_whole(part / MANIFEST, text)
            # Bytes of a checkpoint that had this name are of no use: it did not verify, or it is this.
            _remove(final)
            part.rename(final)
            sync_folder(folder.checkpoints)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)  # its bytes may be what fills the disk
            raise
    _remove(folder.checkpoints / f"broken-{step:06d}")
    return sum(size for size, _ in files.values()) + len(text)


def _describe(array: np.ndarray) -> list[Any]:
    return [str(array.dtype), list(array.shape), array_digest(array)]


def _describe_and_sync(file: Path) -> list[Any]:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return [file.stat().st_size, file_digest(file)]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _path(folder: RunFolder, step: int) -> Path:
    return folder.checkpoints / f"{step:06d}"


def _remove(path: Path) -> None:
    """Delete a folder so that a kill leaves no half of it under its name."""
    if path.exists():
        aside = path.with_name(f".writing-old-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def prune(folder: RunFolder, keep: Iterable[int]) -> None:
    """Delete every checkpoint but these."""
    kept = set(keep)
    for step in steps(folder):
        if step not in kept:
            _remove(_path(folder, step))


def tidy(folder: RunFolder) -> None:
    """Delete what a killed process left unfinished. Only for the holder of the lock."""
    for path in folder.checkpoints.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: RunFolder, step: int) -> None:
    """Rename a checkpoint that does not verify, so that nobody takes it for a good one."""
    aside = folder.checkpoints / f"broken-{step:06d}"
    _remove(aside)
    with contextlib.suppress(OSError):
        _path(folder, step).rename(aside)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Orbax from logging the errors that we report, with a page of traceback each."""
    refuse = lambda record: record.levelno < logging.ERROR
    logger = logging.getLogger("absl")
    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)


def _orbax_save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    import orbax.checkpoint as ocp

    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
        saver.save(path.resolve(), args=ocp.args.PyTreeSave(dict(arrays)))


def _orbax_restore(path: Path, names: Iterable[str]) -> Arrays:
    import orbax.checkpoint as ocp

    kinds = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path.resolve(), args=ocp.args.PyTreeRestore(restore_args=kinds))


# Reading


def steps(folder: RunFolder | str | os.PathLike) -> list[int]:
    """Return the rounds that there are checkpoints of, oldest first, whether whole or not."""
    checkpoints = _folder(folder).checkpoints
    names = [entry.name for entry in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))


def verify(folder: RunFolder | str | os.PathLike) -> list[tuple[int, bool, str]]:
    """Check every checkpoint of a run: -> (step, whether it verifies, why not), oldest first."""
    found, seen = [], {}
    for step in steps(folder):
        try:
            _read(_folder(folder), step, seen)
            found.append((step, True, ""))
        except (Broken, RunError) as error:
            found.append((step, False, str(error)))
    return found


def read_arrays(
    folder: RunFolder | str | os.PathLike, step: int | None = None
) -> tuple[Arrays, dict[str, Any]]:
    """Read the newest checkpoint that verifies, or the given one: -> (arrays by path, facts).

    Paths are those of a `RoundState`: ".server.middle", ".clients[0].a['q']" with a leading client axis.
    Where clients live in a store of rows ("host", "file"), `run.row_store.read_clients` reads them.
    Damage to metrics.jsonl is no matter here. Raises `RunError` where nothing can be read.
    """
    folder, reasons = _folder(folder), []
    for candidate in reversed(steps(folder)) if step is None else (step,):
        try:
            found = _read(folder, candidate, {}, beside="clients/")
            return found.arrays, found.meta
        except Broken as error:
            reasons.append(f"round {candidate}: {error}")
    why = "; ".join(reasons) or "there is none"
    raise RunError(f"{folder.path} has no checkpoint that can be read: {why}")


def restore_newest(
    folder: RunFolder, config_digest: str | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint that verifies, if any: -> (it, what was skipped and why).

    A checkpoint of another config or of a newer format is refused, not skipped: it is no damage.
    """
    skipped, seen = [], {}
    for step in reversed(steps(folder)):
        try:
            found = _read(folder, step, seen)
        except Broken as error:
            skipped.append(f"the checkpoint of round {step} does not verify ({error})")
            continue
        if config_digest is not None and found.meta.get("config_digest") != config_digest:
            raise RunError(
                f"{_path(folder, step)} is a checkpoint of another config; "
                "resume the run with its own, or choose another folder"
            )
        return found, skipped
    return None, skipped


def restore_state(
    folder: RunFolder | str | os.PathLike, like: PyTree
) -> tuple[PyTree, dict[str, Any], list[str]]:
    """Read the newest state that verifies into the tree `like`: -> (state, facts, what was skipped)."""
    found, skipped = restore_newest(_folder(folder))
    if found is None:
        why = "; ".join(skipped) or "there is none"
        raise RunError(f"{_folder(folder).path} has no checkpoint that can be read: {why}")
    return unflatten(like, found.arrays), found.meta, skipped


def read_manifest(folder: RunFolder | str | os.PathLike, step: int) -> dict[str, Any]:
    """Read a checkpoint's manifest; `Broken` where it is damaged, `RunError` where it is too new."""
    path = _path(_folder(folder), step) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        claimed = manifest.pop("digest")
    except FileNotFoundError:
        raise Broken(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise Broken(f"{MANIFEST} cannot be read: {error}") from None
    if _json_digest(manifest) != claimed:
        raise Broken(f"{MANIFEST} is not what was written")
    refuse_newer(path, manifest["format"])
    return manifest


def _folder(folder: RunFolder | str | os.PathLike) -> RunFolder:
    return folder if isinstance(folder, RunFolder) else RunFolder(Path(folder))


def _read(folder: RunFolder, step: int, seen: dict[Any, bool], beside: str = "") -> Checkpoint:
    """Read a checkpoint against its manifest. `seen` remembers which files beside it were checked."""
    manifest, home = read_manifest(folder, step), _path(folder, step)
    for name, (size, digest) in manifest["files"].items():
        _check_file(home / name, name, size, digest, whole=True)
    for name, (size, digest) in manifest["beside"].items():
        if not name.startswith(beside):
            continue
        if (name, size, digest) not in seen:
            # A log may have grown since; a file that failed once fails again.
            seen[name, size, digest] = False
            _check_file(folder.path / name, name, size, digest, whole=False)
            seen[name, size, digest] = True
        if not seen[name, size, digest]:
            raise Broken(f"{name} is damaged")
    described = manifest["arrays"]
    full = [path for path, (_, shape, _) in described.items() if 0 not in shape]
    try:
        arrays = _orbax_restore(home / "arrays", full) if full else {}
    except Exception as error:  # whatever Orbax makes of damage; the digests are the judge
        raise Broken(f"its arrays cannot be read: {error}") from error
    for path, (dtype, shape, _) in described.items():
        if 0 in shape:
            arrays[path] = np.empty(shape, dtype)
    for path, (_, _, digest) in described.items():
        if path not in arrays or array_digest(np.asarray(arrays[path])) != digest:
            raise Broken(f"{path} is not what was written")
    arrays = {path: np.asarray(arrays[path]) for path in described}
    return Checkpoint(step, arrays, {**manifest["meta"], "round": step})


def _check_file(path: Path, name: str, size: int, digest: str, *, whole: bool) -> None:
    try:
        found = path.stat().st_size
        if found < size or (whole and found > size):
            raise Broken(f"{name} has {found} bytes of {size}")
        if file_digest(path, size) != digest:
            raise Broken(f"{name} is not what was written")
    except FileNotFoundError:
        raise Broken(f"{name} is missing") from None
    except OSError as error:
        raise Broken(f"{name} cannot be read: {error.strerror}") from error

"""Checkpoints that say themselves whether they are whole: what they are, and how they are read.

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

A checkpoint gets its name when it is whole and on the disk: what is missing under that name is damage, and
what was being written when a run was killed has another. Damage (`Broken`) is what the bytes say. That they
cannot be read at all (no memory, no permission, too many open files) says nothing of them: a `RunError`.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax.run.disk import Gone, RunError, holding, names_in, reading
from h2tune_jax.run.flat import (
    Arrays,
    Broken,
    array_digest,
    file_digest,
    flatten,
    json_digest,
    state_digest,
    unflatten,
)
from h2tune_jax.run.folder import RunFolder, refuse_newer
from h2tune_jax.run.orbax_arrays import restore_arrays
from h2tune_jax.types import PyTree

__all__ = [
    "Arrays",
    "Broken",
    "Checkpoint",
    "array_digest",
    "broken",
    "checkpoint_path",
    "file_digest",
    "find_damage",
    "flatten",
    "read_arrays",
    "read_manifest",
    "read_newest",
    "restore_newest",
    "restore_state",
    "state_digest",
    "steps",
    "unflatten",
    "verify",
]

MANIFEST = "manifest.json"

_STEP = re.compile(r"[0-9]{6}|[1-9][0-9]{6,}")  # as `checkpoint_path` writes it, and no other way
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_TRIES = 5


class Checkpoint(NamedTuple):
    """A checkpoint that was read and verified."""

    step: int  # rounds done
    arrays: Arrays  # by path, as `flatten` names them
    meta: dict[str, Any]


def checkpoint_path(folder: RunFolder, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return folder.checkpoints / f"{step:06d}"


def steps(folder: RunFolder | str | os.PathLike) -> list[int]:
    """Return the rounds that there are checkpoints of, oldest first, whether whole or not."""
    names = names_in(_folder(folder).checkpoints)
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def broken(folder: RunFolder) -> list[str]:
    """Return the names of the checkpoints that were set aside, oldest first."""
    return [name for name in names_in(folder.checkpoints) if re.fullmatch(r"broken-\d{6,}", name)]


def verify(folder: RunFolder | str | os.PathLike) -> list[tuple[int, bool, str]]:
    """Check every checkpoint of a run: -> (step, whether it verifies, why not), oldest first.

    Those that a run under way deletes meanwhile are left out.
    """
    found, seen = [], {}
    for step in steps(folder):
        try:
            _read(_folder(folder), step, seen)
            found.append((step, True, ""))
        except Gone:
            continue
        except (Broken, RunError) as error:
            found.append((step, False, str(error)))
    return found


def find_damage(folder: RunFolder | str | os.PathLike, step: int) -> str | None:
    """Say why a checkpoint does not verify; None where it does. `RunError` where it cannot be read."""
    try:
        _read(_folder(folder), step, {})
    except Broken as error:
        return f"the checkpoint of round {step} does not verify ({error})"
    return None


def read_arrays(
    folder: RunFolder | str | os.PathLike, step: int | None = None
) -> tuple[Arrays, dict[str, Any]]:
    """Read the newest checkpoint that verifies, or the given one: -> (arrays by path, facts).

    Paths are those of a `RoundState`: ".server.middle", ".clients[0].a['q']" with a leading client axis.
    Where clients live in a store of rows ("host", "file"), `run.row_store.read_clients` reads them.
    Damage to metrics.jsonl is no matter here. Raises `RunError` where nothing can be read.
    """
    found, _ = read_newest(folder, step)
    return found.arrays, found.meta


def read_newest(
    folder: RunFolder | str | os.PathLike, step: int | None = None
) -> tuple[Checkpoint, list[str]]:
    """Read the newest checkpoint that verifies, or the given one: -> (it, what was passed over and why).

    The run may be under way. Raises `RunError` where nothing can be read.
    """
    folder, skipped, gone = _folder(folder), [], []
    for _ in range(_TRIES):
        skipped, gone = [], []
        for candidate in reversed(steps(folder)) if step is None else (step,):
            try:
                return _read(folder, candidate, {}, beside="clients/"), skipped
            except Broken as error:
                skipped.append(f"the checkpoint of round {candidate} does not verify ({error})")
            except Gone as error:
                gone.append(str(error))
        if not gone:
            break  # else its run has a newer one by now
    why = "; ".join(skipped + gone) or "there is none"
    raise RunError(f"{folder.path} has no checkpoint that can be read: {why}")


def restore_newest(
    folder: RunFolder, config_digest: str | None = None, at_most: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint that verifies, if any: -> (it, what was skipped and why).

    With `at_most`, later ones are not looked at. A checkpoint of another config or of a newer format is
    refused, not skipped: it is no damage.
    """
    skipped, seen = [], {}
    for step in reversed(steps(folder)):
        if at_most is not None and step > at_most:
            continue
        try:
            found = _read(folder, step, seen)
        except Broken as error:
            skipped.append(f"the checkpoint of round {step} does not verify ({error})")
            continue
        if config_digest is not None and found.meta.get("config_digest") != config_digest:
            raise RunError(
                f"{checkpoint_path(folder, step)} is a checkpoint of another config; "
                "resume the run with its own, or choose another folder"
            )
        return found, skipped
    return None, skipped


def restore_state(
    folder: RunFolder | str | os.PathLike, like: PyTree
) -> tuple[PyTree, dict[str, Any], list[str]]:
    """Read the newest state that verifies into the tree `like`: -> (state, facts, what was skipped).

    `like` is a `RoundState` of arrays or of shapes. Where clients live in a store of rows ("host",
    "file"), it has none (`clients=()`), and `run.row_store.read_clients` reads them.
    """
    found, skipped = restore_newest(_folder(folder))
    if found is None:
        why = "; ".join(skipped) or "there is none"
        raise RunError(f"{_folder(folder).path} has no checkpoint that can be read: {why}")
    # A run keeps its round among the facts.
    arrays = {".round": np.asarray(found.meta["round"], np.int32), **found.arrays}
    return unflatten(like, arrays), found.meta, skipped


def read_manifest(folder: RunFolder | str | os.PathLike, step: int) -> dict[str, Any]:
    """Read a checkpoint's manifest; `Broken` where it is damaged, `RunError` where it is too new."""
    path = checkpoint_path(_folder(folder), step) / MANIFEST
    with reading(f"the checkpoint of round {step}", path, _advice(path.parent)):
        try:
            text = path.read_bytes()
        except _MISSING:
            raise Broken(f"{MANIFEST} is missing") from None
    try:
        manifest = json.loads(text)
        claimed = manifest.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Broken(f"{MANIFEST} cannot be read: {error}") from None
    if json_digest(manifest) != claimed:
        raise Broken(f"{MANIFEST} is not what was written")
    refuse_newer(path, manifest["format"])
    return manifest


def _folder(folder: RunFolder | str | os.PathLike) -> RunFolder:
    return folder if isinstance(folder, RunFolder) else RunFolder(Path(folder))


def _read(folder: RunFolder, step: int, seen: dict[Any, bool], beside: str = "") -> Checkpoint:
    """Read a checkpoint against its manifest. `seen` remembers which files beside it were checked.

    Raises `Broken`, `Gone` where it is not there or was replaced meanwhile, and `RunError`.
    """
    home, what = checkpoint_path(folder, step), f"the checkpoint of round {step}"
    with reading(what, home):
        before = _identity(home)
    if before is None:
        raise Gone(f"{what} is not there")
    try:
        # While it is held a run under way leaves it where it is.
        with reading(what, home, _advice(home)), holding(home, alone=False) as is_free:
            if not is_free:
                raise Gone(f"{what} is being deleted")
            return _read_against_manifest(folder, step, seen, beside)
    except (Broken, RunError) as error:
        with reading(what, home):
            is_gone = _identity(home) != before
        if is_gone:
            raise Gone(f"{what} was deleted meanwhile") from error
        raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _read_against_manifest(
    folder: RunFolder, step: int, seen: dict[Any, bool], beside: str
) -> Checkpoint:
    manifest, home = read_manifest(folder, step), checkpoint_path(folder, step)
    for name, (size, digest) in manifest["files"].items():
        _check_file(home, home / name, name, size, digest, whole=True)
    for name, (size, digest) in manifest["beside"].items():
        if not name.startswith(beside):
            continue
        key = name, size, digest
        if key not in seen:
            try:
                # A log may have grown since.
                _check_file(home, folder.path / name, name, size, digest, whole=False)
            except Broken:
                seen[key] = False  # what failed once fails again
                raise
            seen[key] = True
        if not seen[key]:
            raise Broken(f"{name} is damaged")
    described = manifest["arrays"]
    full = [path for path, (_, shape, _) in described.items() if 0 not in shape]
    arrays = _restore_whole(home, full) if full else {}
    for path, (dtype, shape, _) in described.items():
        if 0 in shape:
            arrays[path] = np.empty(shape, dtype)
    for path, (_, _, digest) in described.items():
        if path not in arrays or array_digest(np.asarray(arrays[path])) != digest:
            raise Broken(f"{path} is not what was written")
    arrays = {path: np.asarray(arrays[path]) for path in described}
    return Checkpoint(step, arrays, {**manifest["meta"], "round": step})


def _restore_whole(home: Path, names: Iterable[str]) -> Arrays:
    """Read arrays by Orbax. Every file is what was written: whatever it meets here is no damage."""
    try:
        return restore_arrays(home / "arrays", names)
    except (OSError, MemoryError):
        raise  # for `reading`, which says the reason
    except Exception as error:
        reason = str(error).partition("\n")[0] or repr(error)
        raise RunError(
            f"the arrays in {home} cannot be read, although every file is what was written: {reason}; "
            f"nothing was changed: {_advice(home)}"
        ) from error


def _advice(home: Path) -> str:
    return f"try again; if that does not help, move {home} away, and the one before counts"


def _check_file(home: Path, path: Path, name: str, size: int, digest: str, *, whole: bool) -> None:
    with reading(name, path, _advice(home)):
        try:
            found = path.stat().st_size
            if found < size or (whole and found > size):
                raise Broken(f"{name} has {found} bytes of {size}")
            if file_digest(path, size) != digest:
                raise Broken(f"{name} is not what was written")
        except _MISSING:
            raise Broken(f"{name} is missing") from None

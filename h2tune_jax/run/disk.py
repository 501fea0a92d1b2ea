"""What lies on a disk: errors in words, files that are whole, and what outlasts a power cut."""

import contextlib
import errno
import fcntl
import io
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from h2tune_jax.types import FederationError


class RunError(FederationError):
    """What keeps a run from starting, from going on, or from being read; says what can be done."""


class Gone(RunError):
    """What was to be read is no longer there: the run that writes it has gone on."""


@contextlib.contextmanager
def writing(what: str, path: Path, again: str = "resume the run") -> Iterator[None]:
    """Turn errors of the file system into a `RunError` that says what could not be written, and why.

    `again` says what to do once there is room.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        code = _error_code(error)
        if code is None:
            raise
        reason, advice = os.strerror(code), "choose another folder"
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = f"make room and {again}; what was complete before is untouched"
        raise RunError(f"{what} cannot be written to {path}: {reason}; {advice}") from error


@contextlib.contextmanager
def reading(what: str, path: Path, advice: str = "try again") -> Iterator[None]:
    """Turn errors of the machine into a `RunError`.

    Too many open files, no memory, no permission, a disk that does not answer: none of these says
    anything of the bytes, so nobody may conclude that they are damaged.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        reason = "out of memory" if isinstance(error, MemoryError) else error.strerror
        raise RunError(
            f"{what} cannot be read from {path}: {reason or error}; nothing was changed: {advice}"
        ) from error


def _error_code(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # Orbax's store and safetensors report the same in words.
    found = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
    return int(found[1] or found[2]) if found else None


def is_there(path: Path) -> bool:
    """Say whether a path exists; an error of the machine is raised, not taken for a no."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def names_in(path: Path) -> list[str]:
    """Return the sorted names in a folder, none where there is no folder; `RunError` if unreadable."""
    with reading("the folder", path):
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either there in full or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_path(path.parent)


def write_all(file: io.RawIOBase, data: bytes | memoryview) -> None:
    """Write all of the bytes to an unbuffered file, which may take fewer at a time."""
    while data:
        data = data[file.write(data) :]


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they outlast a power cut."""
    made = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in reversed(made):
        sync_path(place.parent)


def sync_path(path: Path) -> None:
    """Make a file's bytes, or what was created or renamed in a folder, outlast a power cut.

    As far as the file system can: some have no such call for folders, and a folder that may be written
    but not listed cannot be opened for it.
    """
    with contextlib.suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)


def sync_tree(path: Path) -> None:
    """Do so with a folder and all that is in it."""
    for place in (*path.rglob("*"), path):
        sync_path(place)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, whose files lie in `folder` when all of them are whole.

    After an error none of them is there, and what `folder` holds beside stays as it is.
    """
    final = folder.resolve()
    make_folder(final.parent)
    home = final if final.is_dir() else final.parent
    part = home / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        sync_tree(part)
        if home != final:
            part.rename(final)
            sync_path(home)
            return
        for file in [path for path in part.rglob("*") if path.is_file()]:
            place = final / file.relative_to(part)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
            sync_path(place.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def holding(folder: Path, *, alone: bool) -> Iterator[bool]:
    """Hold a folder, to read it beside others or (`alone`) to delete it: gives whether it could be had.

    On a file system without such locks it always can.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        is_free = True
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOTSUP):
                raise
        yield is_free
    finally:
        os.close(handle)

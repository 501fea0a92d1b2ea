"""A run's folder: what lies where, who may write, and what was noted when the run began.

RUN/
  config.toml      the resolved config
  run.json         format, seed, versions, commit, device, groups
  lock             held by the process that writes
  metrics.jsonl    what was computed; repeatable bit for bit
  timings.jsonl    clock readings
  checkpoints/     see `run.checkpoint`
  clients/         rows of clients, for the stores "host" and "file"; see `run.store`
"""

import contextlib
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from h2tune_jax.types import FederationError

FORMAT = 1
"""Of run.json and of the checkpoints; a reader refuses what is newer."""


class RunError(FederationError):
    """What keeps a run from starting, from going on, or from being read; says what can be done."""


class RunFolder(NamedTuple):
    """The paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def facts(self) -> Path:
        return self.path / "run.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timings(self) -> Path:
        return self.path / "timings.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def clients(self) -> Path:
        return self.path / "clients"


@contextlib.contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Turn errors of the file system into a `RunError` that says what could not be written, and why."""
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
            advice = "make room and resume the run; what was complete before is untouched"
        raise RunError(f"{what} cannot be written to {path}: {reason}; {advice}") from error


def _error_code(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # Orbax's store reports the same in words.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else None


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either there in full or not at all."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make what was created or renamed in a folder outlast a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def lock_folder(folder: RunFolder) -> Iterator[None]:
    """Hold a run's lock, making the folder where it is missing; refuse where another process has it.

    The system gives the lock back when its holder dies, however it dies.
    """
    with writing("the run", folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        file = folder.lock.open("a+b", buffering=0)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise RunError(
                f"{folder.path} is being written by {holder}; wait for it, or choose another folder"
            ) from None
        with contextlib.suppress(OSError):  # for whoever comes to a locked door; no more
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def holds_run(path: str | os.PathLike) -> bool:
    """Say whether a folder holds a run."""
    return RunFolder(Path(path)).facts.is_file()


def begin_folder(
    folder: RunFolder, config_toml: str, digest: str, notes: Mapping[str, Any], *, resume: bool
) -> list[str]:
    """Note a run's config and circumstances in its folder, whose lock is held: -> what to tell.

    A folder that holds a run already is refused unless `resume`; with it, what the run was begun with
    must be what it goes on with. Something else's folder is always refused.
    """
    if not folder.facts.is_file():
        ours = {folder.lock.name, folder.config.name}
        strange = sorted(
            entry.name
            for entry in folder.path.iterdir()
            if entry.name not in ours and not entry.name.endswith(".part")
        )
        if strange:
            raise RunError(
                f"{folder.path} holds something that is no run ({', '.join(strange[:3])}); "
                "choose an empty folder or a new one"
            )
        facts = {"format": FORMAT, "config_digest": digest, **notes, **circumstances()}
        with writing("the run", folder.path):
            write_whole(folder.config, config_toml)
            write_whole(folder.facts, json.dumps(facts, indent=1) + "\n")
        return []
    if not resume:
        raise RunError(
            f"{folder.path} holds a run already; resume it (--resume), or choose another folder"
        )
    facts = read_facts(folder)
    if facts.get("config_digest") != digest:
        before = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
        raise RunError(
            f"{folder.path} holds a run of another config; {_difference(before, config_toml)}. "
            "Resume it with its own config.toml, or choose another folder"
        )
    now = circumstances()
    moved = [
        f"{name} {facts.get('versions', {}).get(name)} -> {version}"
        for name, version in now["versions"].items()
        if facts.get("versions", {}).get(name) not in (None, version)
    ]
    if facts.get("device") != now["device"]:
        moved.append(f"device {facts.get('device')} -> {now['device']}")
    if not moved:
        return []
    return [f"goes on elsewhere than it began, and may differ in the last bits: {'; '.join(moved)}"]


def read_facts(folder: RunFolder) -> dict[str, Any]:
    """Read run.json, refusing what is no run or of a newer format."""
    try:
        facts = json.loads(folder.facts.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder.path} holds no run: run.json is missing") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{folder.facts} cannot be read: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise RunError(f"{folder.facts} is no run.json: it has no format")
    refuse_newer(folder.facts, facts["format"])
    return facts


def refuse_newer(path: Path, found: int) -> None:
    """Refuse a format that is newer than this program."""
    if found > FORMAT:
        raise RunError(
            f"{path} was written in format {found}; this version reads up to {FORMAT}: "
            "update h2tune-jax to go on with it"
        )


def _difference(before: str, after: str) -> str:
    try:
        old, new = (dict(_leaves(tomllib.loads(text))) for text in (before, after))
    except tomllib.TOMLDecodeError:
        return "its config.toml cannot be read"
    other = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    return "; ".join(other[:3]) + ("; and more" if other[3:] else "") if other else "digests differ"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        at = f"{path}.{key}" if path else str(key)
        if isinstance(inner, dict | list):
            yield from _leaves(inner, at)
        else:
            yield at, inner


def circumstances() -> dict[str, Any]:
    """Return what a result may depend on beside the config: versions, commit, device."""
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
    return {"versions": _versions(), "commit": _commit(), "device": device}


@functools.cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    requirements = importlib.metadata.requires("h2tune-jax") or []
    plain = [line for line in requirements if "extra ==" not in line]
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in plain} | {"h2tune-jax", "jaxlib"}
    for name in sorted(names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@functools.cache
def _commit() -> str | None:
    """Return the commit that this process runs, if from a checkout; "+" says that files were changed."""
    here = Path(__file__).resolve().parent
    run = lambda *args: subprocess.run(
        ["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()
    try:
        # A copy inside somebody else's repository is not that repository's commit.
        if run("ls-files", "--error-unmatch", Path(__file__).name) == "":
            return None
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None

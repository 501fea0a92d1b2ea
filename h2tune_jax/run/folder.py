"""A run's folder: what lies where, who may write, and what was noted when the run began.

RUN/
  config.toml      the resolved config
  run.json         format, seed, versions, commit, device, groups, digests of the training data
  lock             held by the process that writes
  metrics.jsonl    what was computed; repeatable bit for bit
  timings.jsonl    clock readings
  notices.jsonl    what a reader should know; see `run.notices`
  checkpoints/     see `run.checkpoint`
  clients/         rows of clients, for the stores "host" and "file"; see `run.store`
"""

import contextlib
import fcntl
import functools
import importlib.metadata
import io
import json
import os
import platform
import re
import socket
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from h2tune_jax.run.disk import (
    RunError,
    is_there,
    make_folder,
    names_in,
    reading,
    write_whole,
    writing,
)
from h2tune_jax.run.flat import array_digest, flatten, json_digest
from h2tune_jax.types import ClientData

FORMAT = 1
"""Of run.json and of the checkpoints; a reader refuses what is newer."""

DATA_BYTES = 64 * 2**20
"""So much of a group's training data is read to tell whether it is what it was: a fraction of a second."""


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
    def notices(self) -> Path:
        return self.path / "notices.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def clients(self) -> Path:
        return self.path / "clients"


_HOLDER = re.compile(rb"(process \d+ on [^\n]*\n?)?\0*")
"""What a lock of ours may hold: nothing, who has it, or the zeros that a power cut leaves."""

_LONGEST = 4096

_TRIES, _PAUSE = 4, 0.05


@contextlib.contextmanager
def lock_folder(folder: RunFolder) -> Iterator[None]:
    """Hold a run's lock, making the folder where it is missing; refuse where another process has it.

    The system gives the lock back when its holder dies, however it dies. A folder of something else is
    refused before anything is created in it, and a file called `lock` that is not ours is left as it is.
    """
    _refuse_strangers(folder)
    with writing("the run", folder.path):
        make_folder(folder.path)
        # Nothing is cut off or written before the lock is held, and the file is known to be ours.
        file = io.FileIO(os.open(folder.lock, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    with file:
        with writing("the run's lock", folder.lock):
            _seize(folder, file)
            held = file.read(_LONGEST + 1)
        if len(held) > _LONGEST or not _HOLDER.fullmatch(held):
            raise RunError(
                f"{folder.lock} is no lock of a run, and was left as it is; choose another folder"
            )
        with contextlib.suppress(OSError):  # for whoever comes to a locked door; no more
            file.truncate(0)
            file.seek(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _seize(folder: RunFolder, file: io.FileIO) -> None:
    for left in reversed(range(_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if left:  # who looks whether the run is live holds the lock for a moment
                time.sleep(_PAUSE)
        else:
            return
    holder = file.read(_LONGEST).decode(errors="replace").strip("\0\n ") or "another process"
    raise RunError(
        f"{folder.path} is being written by {holder}; wait for it, or choose another folder"
    )


def is_live(folder: RunFolder) -> bool:
    """Say whether a process writes this run."""
    # A holder says who it is; only then is the lock tried, which a writer that just starts could mind.
    try:
        with folder.lock.open("rb") as file:
            if not file.read(1):
                return False
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:  # there is no lock, or none that may be looked at
        return False
    return False


def _refuse_strangers(folder: RunFolder) -> None:
    """Refuse a folder that holds something and no run. A kill may have left the first files of one."""
    names = names_in(folder.path)
    if folder.facts.name in names:
        return
    begun = folder.config.name, folder.facts.name
    ours = {folder.lock.name, folder.config.name, *(f".{name}.part" for name in begun)}
    strange = [name for name in names if name not in ours]
    if strange:
        raise RunError(
            f"{folder.path} holds something that is no run ({', '.join(strange[:3])}); "
            "choose an empty folder or a new one"
        )


def holds_run(path: str | os.PathLike) -> bool:
    """Say whether a folder holds a run."""
    folder = RunFolder(Path(path))
    with reading("the run", folder.path):
        return is_there(folder.facts)


def begin_folder(
    folder: RunFolder, config_toml: str, digest: str, notes: Mapping[str, Any], *, resume: bool
) -> list[str]:
    """Note a run's config and circumstances in its folder, whose lock is held: -> what to tell.

    A folder that holds a run already is refused unless `resume`; with it, what the run was begun with
    must be what it goes on with. Something else's folder is always refused.
    """
    if not holds_run(folder.path):
        _refuse_strangers(folder)
        if _read_config(folder) not in (None, config_toml):
            raise RunError(
                f"{folder.config} is there already, with another config than this run's; it was left as "
                "it is: choose an empty folder or a new one"
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
        before = _read_config(folder) or ""
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
    if facts.get("commit") not in (None, now["commit"]):
        moved.append(f"commit {facts['commit']} -> {now['commit']}")
    if not moved:
        return []
    return [f"goes on elsewhere than it began, and may differ in the last bits: {'; '.join(moved)}"]


def note_data(folder: RunFolder, data: Mapping[str, ClientData]) -> None:
    """Note in run.json by group what a run trains on, its lock held; refuse what is not what was noted.

    A config names files, and a file may be another by now.
    """
    facts = read_facts(folder)
    found = {name: data_digest(one) for name, one in data.items()}
    noted = facts.get("data")
    if noted is None:  # the run begins now, or was begun by a version that did not note it
        with writing("the run", folder.path):
            write_whole(folder.facts, json.dumps({**facts, "data": found}, indent=1) + "\n")
        return
    other = [name for name, digest in found.items() if noted.get(name) != digest]
    if other:
        raise RunError(
            f"{folder.path} was begun on other training data than now (group {', '.join(other)}). Give it "
            "the data that it was begun on, or choose another folder"
        )


def data_digest(data: ClientData) -> str:
    """Return the SHA-256 of the examples (numpy leaves [C, n, ...]) that clients hold, and of how many.

    Where they are more than `DATA_BYTES`, every second example is read, or every third, and so on.
    """
    counts = np.asarray(data.num_examples)
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(data.examples).items()}
    step = max(-(-sum(leaf.nbytes for leaf in leaves.values()) // DATA_BYTES), 1)
    digests = {"counts": array_digest(counts)}
    for path, leaf in leaves.items():
        clients, places = np.nonzero(np.arange(leaf.shape[1]) < counts[:, None])
        digests[f"examples{path}"] = array_digest(leaf[clients[::step], places[::step]])
    return json_digest(digests)


def _read_config(folder: RunFolder) -> str | None:
    with reading("the run's config", folder.config):
        try:
            return folder.config.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None


def read_facts(folder: RunFolder) -> dict[str, Any]:
    """Read run.json, refusing what is no run or of a newer format."""
    with reading("the run", folder.facts):
        text = folder.facts.read_bytes() if is_there(folder.facts) else None
    if text is None:
        raise RunError(f"{folder.path} holds no run: run.json is missing")
    try:
        facts = json.loads(text)
    except ValueError as error:
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

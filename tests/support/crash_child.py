"""A run that may be told to die by SIGKILL at its n-th touch of the disk; used by tests of crashes.

    python crash_child.py OUT STORE ROUNDS CACHE [DIE_AT]

Prints "round N" as rounds are told, "warning TEXT", and "done DIGEST" at the end.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import toy
import toy_run

from h2tune_jax.run import checkpoint, disk, rows, write_checkpoint
from h2tune_jax.run.events import Notice, RoundDone
from h2tune_jax.run.row_store import read_clients

SETTINGS = {
    "sampling": {"kind": "uniform", "count": 2},
    "evaluation": {"batch_size": 4, "every": 3},
    "checkpoints": {"every": 2, "keep_last": 2},
    "groups": toy_run.GROUPS[:1],
}


def settings(store, rounds):
    return toy_run.config(rounds, **SETTINGS, store={"kind": store})


def federation():
    whole = toy_run.federation(toy.make_specs()[:1])
    return whole._replace(bases=whole.bases[:1], probe=None)


def final_digest(out):
    """One digest over the newest checkpoint: the server, and every client that trained."""
    arrays, meta = checkpoint.read_arrays(out)
    server = {path: value for path, value in arrays.items() if path.startswith(".server")}
    ids, clients = read_clients(out, 0)
    held = {**server, **clients, "ids": ids}
    return f"{meta['round']}-{checkpoint.state_digest(held)}"


def die_at(count):
    """Wrap what touches the disk: before and after each, the process may end."""
    touches = itertools.count(1)

    def touch():
        if next(touches) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner, name):
        real = getattr(owner, name)

        def wrapped(*args, **options):
            touch()
            result = real(*args, **options)
            touch()
            return result

        setattr(owner, name, wrapped)

    for owner, name in (
        (write_checkpoint, "save_arrays"),
        (write_checkpoint, "write_whole"),
        (write_checkpoint, "_describe_and_sync"),
        (write_checkpoint, "sync_path"),
        (write_checkpoint.shutil, "rmtree"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "unlink"),
        (disk.os, "fsync"),
        (rows.Segments, "write"),
    ):
        wrap(owner, name)


def main(out, store, rounds, cache, count="0"):
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if int(count):
        die_at(int(count))

    def say(event):
        if isinstance(event, RoundDone):
            print("round", event.record["round"], flush=True)
        elif isinstance(event, Notice) and event.level == "warning":
            print("warning", event.text, flush=True)

    toy_run.run(Path(out), settings(store, int(rounds)), federation=federation(), observers=[say])
    print("done", final_digest(out), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

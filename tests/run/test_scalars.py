import struct
import sys
import types
from pathlib import Path

import pytest

from h2tune_jax.run.events import Finished, RoundDone, Started
from h2tune_jax.run.scalars import scalar_observer, scalars_of
from h2tune_jax.run.tensorboard import tensorboard
from h2tune_jax.run.wandb import wandb
from h2tune_jax.types import FederationError


class Config(types.SimpleNamespace):
    def model_dump(self, mode):
        assert mode == "json"
        return {"rounds": 3}


CONFIG = Config(name="demo")
RECORD = {
    "round": 1,
    "cohorts": {"a": {"clients": [4, 5], "loss": [1.0, 3.0], "rejected": 1}},
    "server": {"drift": 0.25, "note": None},
    "bytes_up": 10,
    "bytes_down": 20,
    "evaluation": {"trained": {"a": {"accuracy": [0.5, None]}, "b": {"accuracy": [None]}}},
}
TIMING = {"round": 1, "seconds": 2.0, "clients_per_second": 1.0}
EXPECTED = {
    "train/a/loss": 2.0,
    "train/a/rejected": 1.0,
    "trained/a/accuracy": 0.5,
    "server/drift": 0.25,
    "bytes/up": 10.0,
    "bytes/down": 20.0,
    "time/seconds": 2.0,
    "time/clients_per_second": 1.0,
}


def begin(folder):
    return Started(CONFIG, None, folder, 1, 3)


def read_events(folder):
    """Read TensorBoard's records: length, checksum, protobuf, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in Path(folder).iterdir():
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_names_and_means():
    assert scalars_of(RECORD, TIMING) == EXPECTED


def test_tensorboard_events(tmp_path):
    observe = tensorboard()
    observe(begin(tmp_path))
    observe(RoundDone(RECORD, TIMING))
    observe(Finished("complete", 2, tmp_path))
    found = read_events(tmp_path / "tensorboard")
    assert found == {(name, 2): value for name, value in EXPECTED.items()}


def test_tensorboard_needs_a_folder():
    with pytest.raises(FederationError, match=r"needs tensorboard\(folder\)"):
        tensorboard()(begin(None))


def test_wandb_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(FederationError, match=r"pip install 'h2tune-jax\[wandb\]'"):
        wandb()


def test_wandb_gets_config_and_rounds(monkeypatch, tmp_path):
    calls = []
    run = types.SimpleNamespace(
        log=lambda scalars, step: calls.append(("log", scalars, step)),
        finish=lambda: calls.append(("finish",)),
    )

    def init(**options):
        calls.append(("init", options))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        observe = wandb(tags=["x"])
        observe(begin(tmp_path))
        observe(RoundDone(RECORD, TIMING))
        observe(Finished("complete", 2, tmp_path))
    (_, options), (_, scalars, step), (_,) = calls[:3]
    assert options["project"] == "h2tune"
    assert options["config"] == {"rounds": 3}
    assert options["tags"] == ["x"]
    assert options["resume"] == "allow"
    assert (scalars, step) == (EXPECTED, 2)
    # The same folder goes on as the same run.
    assert calls[3][1]["id"] == options["id"]


def test_an_error_while_writing_does_not_end_the_run(capsys):
    calls = []

    def write(scalars, step):
        calls.append(step)
        raise OSError("no space left")

    observe = scalar_observer("X", begin=lambda event: None, write=write, end=lambda: None)
    observe(begin(None))
    observe(RoundDone(RECORD, TIMING))
    observe(RoundDone(RECORD, TIMING))
    observe(Finished("complete", 2, None))
    assert calls == [2]
    assert capsys.readouterr().err == "X stopped, the run goes on: OSError('no space left')\n"


def test_an_error_at_the_beginning_does():
    def fail(event):
        raise FederationError("no")

    observe = scalar_observer("X", begin=fail, write=lambda s, i: None, end=lambda: None)
    with pytest.raises(FederationError):
        observe(begin(None))

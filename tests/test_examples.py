"""The documented examples run and do what they say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_strangers_model_federates(capsys):
    example = load(ROOT / "experiments/bring_your_own_model/federate.py")
    accuracy = example.main(rounds=6)
    # Chance is a third and a quarter.
    assert accuracy["h2tune"]["narrow"] > 0.5
    assert accuracy["h2tune"]["wide"] > 0.4
    assert "numbers sent up a client {'narrow': 96, 'wide': 640}" in capsys.readouterr().out

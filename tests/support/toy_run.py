"""The toy federation as a run: hand-made specs and data under a real config."""

import jax
import numpy as np
import toy

from h2tune_jax.methods.local import local
from h2tune_jax.run.config import config_digest, config_toml, make_config
from h2tune_jax.run.federation import Federation, GroupFacts
from h2tune_jax.run.folder import RunFolder, begin_folder, lock_folder
from h2tune_jax.run.loop import run_rounds
from h2tune_jax.run.programs import Programs

GROUPS = [
    {
        "name": name,
        "count": count,
        "rank": 2,
        "model": {"source": "minilm"},
        "task": {"data": "toy.jsonl"},
    }
    for name, count in (("narrow", 5), ("wide", 3))
]


def config(rounds=4, **changes):
    data = {
        "name": "toy",
        "seed": 7,
        "rounds": rounds,
        "method": {"name": "local"},
        "evaluation": {"batch_size": 4},
        "groups": GROUPS,
    }
    return make_config({**data, **changes})


def federation(specs=None):
    specs = toy.make_specs() if specs is None else specs
    data = jax.tree.map(np.array, toy.make_data(specs))
    facts = tuple(
        GroupFacts(
            spec.name, None, None, ("a", "b"), "toy", "classification", 0.5,
            tuple(f"{spec.name}/{i}" for i in range(spec.num_clients)),
        )
        for spec in specs
    )  # fmt: skip
    return Federation(specs, toy.make_bases(), data, (None,) * len(specs), data, toy.probe(), facts)


def method():
    return local(learning_rate=0.05, optimizer_state="kept")


def run(out, config, *, method=None, federation=None, programs=None, observers=(), **options):
    """Run the toy in a folder, resuming what is there; or, with out=None, in memory."""
    built = toy_method() if method is None else method
    made = toy_federation() if federation is None else federation
    args = built, made, config
    if out is None:
        return run_rounds(*args, observers=observers, programs=programs, **options)
    folder = RunFolder(out)
    with lock_folder(folder):
        said = begin_folder(folder, config_toml(config), config_digest(config), {}, resume=True)
        return run_rounds(
            *args, folder=folder, observers=observers, notices=said, programs=programs, **options
        )


def programs():
    """Compile what many runs of the toy have in common."""
    made = federation()
    return Programs(method(), made.specs, made.bases, made.probe, config())


def run_with(programs, out, config=None, **options):
    """Run the toy with programs that are there already."""
    given = toy_config() if config is None else config
    return run(out, given, method=programs.method, programs=programs, **options)


toy_method, toy_federation, toy_config = method, federation, config

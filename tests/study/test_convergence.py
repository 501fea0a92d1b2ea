"""The study as a command: rows, verdicts and exit codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import h2tune_jax as h2
from h2tune_jax.study import convergence, horizon, rows
from h2tune_jax.study.settings import (
    PROBLEMS,
    SETTINGS,
    SMOKE,
    Setting,
    build_method,
    build_problem,
)

FEDAVG = ["--problem", "quadratic", "--method", "fedavg", "--seeds", "8"]
SHORT = ["--horizons", "16", "32", "64", "128"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def run(folder, *args):
    return convergence.main([*args, "--out", str(folder)])


def test_smoke_study_is_consistent_and_runs_once(folder, monkeypatch, capsys):
    assert run(folder, "--smoke") == 0
    assert "consistent with O(T^-0.5): slope -0." in capsys.readouterr().out
    written = (folder / "smoke-fedavg.csv").read_text()
    monkeypatch.setattr(horizon, "make_horizon", None)
    assert run(folder, "--smoke") == 0
    assert run(folder, "--smoke", "--judge", "--expect", "inconsistent") == 1
    assert (folder / "smoke-fedavg.csv").read_text() == written
    rounds = rows.read_rounds(folder / "smoke-fedavg.rounds.csv")
    assert rounds["last_round"].max() == 127


@pytest.mark.parametrize(
    ("name", "step", "constant"),
    [("constant", "constant", "0.3"), ("inverse", "inverse", "1"), ("large", "sqrt", "300")],
)
def test_wrong_steps_are_flagged(folder, capsys, name, step, constant):
    long = ["--horizons", "128", "256", "512", "1024"]
    args = [*FEDAVG, *long, "--step", step, "--constants", constant, "--name", f"wrong/{name}"]
    assert run(folder, *args) == 1
    assert "NOT consistent" in capsys.readouterr().out
    assert run(folder, *args, "--judge", "--expect", "inconsistent") == 0


def test_one_slow_constant_among_good_ones_is_inconsistent(folder):
    args = [*FEDAVG, *SHORT, "--constants", "1", "0.001", "--name", "own/slow"]
    assert run(folder, *args) == 1


def test_a_horizon_may_be_added_later(folder, capsys):
    args = [*FEDAVG, "--constants", "1", "--name", "own/longer"]
    assert run(folder, *args, "--horizons", "16", "32", "64") == 2
    assert "a verdict needs 4 horizons, there are 3" in capsys.readouterr().err
    assert run(folder, *args, *SHORT, "--judge") == 2
    assert "has no rows of T = 128" in capsys.readouterr().err
    assert run(folder, *args, *SHORT) == 0
    assert "T = 64" not in capsys.readouterr().out


def test_bad_requests_are_told(folder, capsys):
    for args, message in (
        (["h2tune/sensin"], "did you mean 'h2tune/sensing'"),
        ([], "name a setting"),
        (["fedavg/sqrt", "--judge"], "there are no rows"),
        ([*FEDAVG, "--problem-option", "size=3"], "size"),
        ([*FEDAVG, "--option", "rate=3"], "unknown option"),
        ([*FEDAVG, "--option", "rate"], "expected key=value"),
        (["--problem", "sensing", "--measure", "gap", "--judge"], "no rows"),
        (["fedavg/sqrt", "--participation", "0.5"], "--participation: of a setting of your own"),
        (["fedavg/sqrt", "--seeds", "3"], "a verdict needs 4 seeds, there are 3"),
    ):
        assert run(folder, *args) == 2
        assert message in capsys.readouterr().err


def test_all_named_settings_can_be_listed_and_built(capsys):
    assert convergence.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SETTINGS)
    for setting in SETTINGS.values():
        method, _, hyper_fn = build_method(setting)
        rate = jnp.asarray(0.25)
        hyper = hyper_fn(method.hyper, rate)
        assert hyper.learning_rate == rate
        if setting.noise is not None and setting.noise[2] == "steps":
            assert hyper.clip == rate * setting.noise[0]
        if setting.problem != "transformer":  # it needs its data set
            method.check(build_problem(setting).specs)
    assert {setting.problem for setting in SETTINGS.values()} == set(PROBLEMS)


def test_the_theorem_is_the_default_of_h2tune():
    method, _, hyper_fn = build_method(SETTINGS["h2tune/sensing"])
    problem = build_problem(SETTINGS["h2tune/sensing"])
    hyper = hyper_fn(method.hyper, jnp.asarray(0.1))
    assert hyper.learning_rate == hyper.shared_rate == hyper.head_rate == jnp.asarray(0.1)
    assert hyper.lambda_norm == hyper.lambda_keep == hyper.lambda_distil == 0
    state = h2.init_round(method, problem.specs, problem.bases, None, jax.random.key(0))
    round_fn = h2.make_round(method, problem.specs, client_axis="vmap", donate=False)
    after, metrics = round_fn(state, problem.bases, problem.data, None, None, hyper, np.uint32(0))
    for before, now in zip(state.clients, after.clients):
        np.testing.assert_array_equal(before.active, now.active)
        np.testing.assert_array_equal(before.scores, now.scores)
    # Alternating from the first round on: terms that are left out show as zero.
    for seen in metrics.clients.values():
        assert not np.any(seen["norm"])
        assert not np.any(seen["keep"])
        assert not np.any(seen["distil"])


@pytest.mark.parametrize(
    ("options", "still"),
    [
        ({}, set()),
        ({"train_relation": False}, {"relation"}),
        ({"upload": "transpose"}, {"relation"}),
        ({"train_factors": False}, {"a", "b"}),
        # What a preset holds still counts, unless the study says otherwise.
        ({"preset": "common"}, {"relation"}),
        ({"preset": "common", "train_relation": True}, set()),
    ],
)
def test_a_study_counts_what_its_method_trains(options, still):
    if "preset" in options:
        options = {**options, "selection": "leading", "sharing": "mean"}
    setting = Setting(name="own/still", problem="sensing", options=options)
    _, trained_fn, _ = build_method(setting)
    method = h2.h2tune(selection="score_frozen")  # whichever: a client that has all the parts
    problem = build_problem(setting)
    state = h2.init_round(method, problem.specs, problem.bases, None, jax.random.key(0))
    client = jax.tree.map(lambda leaf: leaf[0], state.clients[0])
    seen = trained_fn(problem.specs[0], client, jax.tree.map(jnp.ones_like, client))
    moves = {
        field: any(np.any(leaf) for leaf in jax.tree.leaves(getattr(seen, field)))
        for field in ("a", "b", "relation", "scores")
    }
    assert {field for field, counts in moves.items() if not counts} == still


def test_participation_draws_others_every_round_and_with_every_seed():
    specs = build_problem(SMOKE).specs
    draw = lambda seed, index: horizon._participants(
        specs, 0.3, jnp.asarray(seed, jnp.uint32), jnp.asarray(index)
    )
    drawn = {tuple(np.sort(draw(seed, index)[0])) for seed in range(3) for index in range(5)}
    assert len(drawn) > 10
    assert all(len(set(ids)) == 3 for ids in drawn)
    assert horizon._participants(specs, 1.0, jnp.zeros((), jnp.uint32), jnp.zeros(())) is None
    counts = np.bincount(np.concatenate([draw(seed, 0)[0] for seed in range(200)]), minlength=10)
    assert (np.abs(counts / 200 - 0.3) < 0.12).all()


def test_fewer_participants_make_more_noise(folder):
    # Without gradient noise and with all clients the run is the same for every seed.
    start = Setting(
        name="own/all",
        problem="quadratic",
        problem_options={"sigma": 0.0},
        method="fedavg",
        constants=(1.0,),
        horizons=(16,),
        seeds=4,
    )
    spreads = []
    for share in (1.0, 0.2):
        setting = dataclasses.replace(start, name=f"own/{share}", participation=share)
        path = convergence.rows_path(folder, setting)
        convergence.run_setting(setting, path)
        spreads.append(np.ptp(rows.read_rows(path)["shared"]))
    assert spreads[0] == 0
    assert spreads[1] > 1e-3


@pytest.mark.slow
def test_h2tune_converges_as_claimed(folder):
    args = ["--horizons", "32", "64", "128", "256", "--seeds", "4", "--constants", "0.3"]
    assert run(folder, "h2tune/partial", *args) == 0


@pytest.mark.slow
def test_any_method_can_be_studied(folder):
    args = ["--problem", "sensing", "--method", "local", "--constants", "0.3", "--seeds", "4"]
    assert run(folder, *args, *SHORT) in (0, 1)
    table = rows.read_rows(folder / "own-local-sensing.csv")
    assert not np.any(table["shared"])  # nothing is shared
    assert (table["personal"] > 0).all()
    _, values = rows.by_seed(table, 0.3, table["personal"])
    assert (np.diff(values.mean(axis=1)) < 0).all()

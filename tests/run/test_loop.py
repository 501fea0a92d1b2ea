"""The loop: what it records, and when it tests."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import toy_run
from toy_run import run_with as run

import h2tune_jax as h2
from h2tune_jax.run import checkpoint, moments
from h2tune_jax.run.events import Finished, RoundDone, Saved, Started
from h2tune_jax.run.feed import Feed
from h2tune_jax.run.folder import RunFolder
from h2tune_jax.run.loop import last_means
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.records import read_lines
from h2tune_jax.run.row_store import read_clients
from h2tune_jax.run.scalars import scalars_of

programs = pytest.fixture(toy_run.programs, scope="module")


def test_a_run_is_the_rounds_of_the_core(programs):
    """The same rounds by hand, from the state that the run starts with."""
    result = run(programs, None)
    state = h2.RoundState(jnp.int32(0), (), tuple(start_all(programs)))
    round_fn = h2.make_round(programs.method, programs.specs, donate=False)
    data = toy.make_data(programs.specs)
    for record in result.records:
        state, metrics = round_fn(
            state,
            programs.bases,
            data,
            None,
            None,
            programs.method.hyper,
            np.uint32(7),
            toy.probe(),
        )
        for name in ("narrow", "wide"):
            for metric in ("loss", "accuracy"):
                np.testing.assert_allclose(
                    record["cohorts"][name][metric], metrics.clients[name][metric], rtol=1e-5
                )
    toy.assert_trees_close(result.state.clients, state.clients)
    found = h2.make_evaluate(programs.method, programs.specs, batch_size=4)(
        result.state, programs.bases, data
    )
    tested = result.records[-1]["evaluation"]["trained"]
    np.testing.assert_allclose(tested["narrow"]["loss"], found["narrow"]["loss"], rtol=1e-5)
    mean = float(np.mean(tested["wide"]["accuracy"]))
    assert result.final["trained"]["wide"]["accuracy"] == pytest.approx(mean)
    assert programs.run_round._cache_size() == 1  # type: ignore[attr-defined]


def start_all(programs):
    from h2tune_jax.run.store import DeviceStore

    store = DeviceStore(programs)
    store.begin(programs.start_server())
    return store.clients


def test_records_have_a_fixed_form(programs):
    config = toy_run.config(3, evaluation={"batch_size": 4, "every": 2, "before": True})
    records = run(programs, None, config).records
    assert [line["round"] for line in records] == [-1, 0, 1, 2]
    assert ["evaluation" in line for line in records] == [True, False, True, True]
    assert records[0]["cohorts"] == {}
    assert list(records[1]) == ["round", "cohorts", "server", "bytes_up", "bytes_down"]
    narrow = records[1]["cohorts"]["narrow"]
    assert set(narrow) == {"clients", "loss", "accuracy", "steps", "rejected"}
    assert (narrow["clients"], narrow["steps"]) == ([0, 1, 2, 3, 4], [3, 3, 2, 2, 2])
    assert set(records[0]["evaluation"]["trained"]["wide"]) == {"clients", "loss", "accuracy"}


def test_traffic_is_counted_in_bytes(capsys):
    """FedAvg of heads of 8 x 3 float32 numbers, and a client that goes wrong, which is said once."""
    specs = (toy.make_specs(targets=())[0],)
    federation = toy_run.federation(specs)
    federation = federation._replace(bases=federation.bases[:1], probe=None)
    federation.train[0].examples["x"][2] = np.nan
    groups = toy_run.GROUPS[:1]
    config = toy_run.config(2, groups=groups, method={"name": "fedavg"}, store={"kind": "host"})
    result = toy_run.run(None, config, method=h2.fedavg(), federation=federation)
    for record in result.records:
        assert (record["bytes_up"], record["bytes_down"]) == (5 * 24 * 4, 5 * 24 * 4)
        assert record["cohorts"]["narrow"]["rejected"] == 1
        assert record["cohorts"]["narrow"]["loss"][2] is None
    assert capsys.readouterr().err == (
        "h2tune: warning: group 'narrow': 1 of 5 results of round 0 are not finite, and were left out; "
        "this is said once, metrics.jsonl counts them under 'rejected'\n"
    )


def test_observers_are_told_in_order(programs, tmp_path):
    told = []
    run(programs, tmp_path / "run", observers=[told.append])
    assert isinstance(told[0], Started)
    assert (told[0].first_round, told[0].total_rounds) == (0, 4)
    assert isinstance(told[-1], Finished)
    assert told[-1][:2] == ("complete", 4)
    done = [event for event in told if isinstance(event, RoundDone)]
    assert [event.record for event in done] == read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [event.timing for event in done] == read_lines(tmp_path / "run" / "timings.jsonl")
    assert all(event.timing["seconds"] > 0 for event in done)
    assert [event.round for event in told if isinstance(event, Saved)] == [1, 2, 3, 4]


def test_metrics_are_fetched_one_round_late(programs, monkeypatch):
    """When a round's metrics are told, the next round is with the device already."""
    handed, seen = [], []
    real = programs.run_round

    def count(state, *args):
        handed.append(len(handed))
        return real(state, *args)

    monkeypatch.setattr(programs, "run_round", count)

    def watch(event):
        if isinstance(event, RoundDone):
            seen.append((event.record["round"], len(handed)))

    run(programs, None, observers=[watch])
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]


def test_rates_follow_the_schedule_over_rounds(programs, monkeypatch):
    rates, real = [], programs.run_round

    def watch(state, bases, data, ids, weights, hyper, *rest):
        rates.append(
            (float(hyper.learning_rate), float(hyper.head_rate), float(hyper.weight_decay))
        )
        return real(state, bases, data, ids, weights, hyper, *rest)

    monkeypatch.setattr(programs, "run_round", watch)
    schedule = {"kind": "linear", "warmup": 1, "final": 0.25}
    run(programs, None, toy_run.config(4, schedule=schedule))
    expected = 0.05 * np.asarray([1, 1, 0.625, 0.25])
    np.testing.assert_allclose([rate for rate, _, _ in rates], expected, rtol=1e-6)
    np.testing.assert_allclose([head for _, head, _ in rates], expected, rtol=1e-6)
    assert {decay for _, _, decay in rates} == {0.0}


def test_newcomers_stay_out_of_training_and_change_nothing(programs):
    evaluation = {"batch_size": 4, "newcomers": {"count": 1, "steps": 3}}
    result = run(programs, None, toy_run.config(2, evaluation=evaluation))
    plain_run = run(
        programs, None, toy_run.config(2, sampling=only_first(4, 2), evaluation={"batch_size": 4})
    )
    toy.assert_trees_equal(result.state, plain_run.state)
    for ours, expected in zip(result.records, plain_run.records):
        assert ours["cohorts"] == expected["cohorts"]
        tested = ours["evaluation"]
        assert tested["newcomers"]["narrow"]["clients"] == [4]
        assert tested["newcomers"]["wide"]["clients"] == [2]
        assert tested["trained"]["narrow"]["clients"] == [0, 1, 2, 3]
        # They learned something in three steps, from where untrained clients stand.
        before = expected["evaluation"]["trained"]["narrow"]["loss"][4]
        assert tested["newcomers"]["narrow"]["loss"][0] < before


def only_first(narrow, wide):
    names = [f"narrow/{i}" for i in range(narrow)] + [f"wide/{i}" for i in range(wide)]
    return {"kind": "schedule", "schedule": [names]}


def test_participants_alone_may_be_tested(programs):
    evaluation = {"batch_size": 4, "clients": "participants"}
    sampling = {"kind": "uniform", "count": 2}
    records = run(
        programs, None, toy_run.config(3, evaluation=evaluation, sampling=sampling)
    ).records
    everyone = run(programs, None, toy_run.config(3, sampling=sampling)).records
    for ours, full in zip(records, everyone):
        ids = ours["cohorts"]["narrow"]["clients"]
        tested, among = (line["evaluation"]["trained"]["narrow"] for line in (ours, full))
        assert tested["clients"] == ids
        np.testing.assert_allclose(tested["loss"], [among["loss"][i] for i in ids], rtol=1e-6)


def test_many_clients_are_tested_in_chunks(programs, monkeypatch):
    whole = run(programs, None, toy_run.config(1)).records
    monkeypatch.setattr(moments, "WIDTH", 2)
    parts = run(programs, None, toy_run.config(1)).records
    for name in ("narrow", "wide"):
        one, other = (r[0]["evaluation"]["trained"][name] for r in (whole, parts))
        assert one["clients"] == other["clients"]
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["device", "file"])
def test_a_group_may_sit_a_round_out(programs, tmp_path, kind):
    schedule = [["narrow/1", "narrow/3"], ["wide/0", "wide/2", "narrow/3", "narrow/4"]]
    sampling = {"kind": "schedule", "schedule": schedule}
    config = toy_run.config(3, sampling=sampling, store={"kind": kind})
    result = run(programs, tmp_path / kind, config)
    assert [sorted(line["cohorts"]) for line in result.records] == [
        ["narrow"],
        ["narrow", "wide"],
        ["narrow"],
    ]
    tested = [line["evaluation"]["trained"]["wide"]["loss"] for line in result.records]
    assert tested[0] != tested[1] == tested[2]
    _, clients = read_clients(tmp_path / kind, 0, [1, 3])
    start = jax.tree.map(lambda leaf: leaf[np.asarray([1, 3])], start_all(programs)[0])
    moved = checkpoint.flatten(start)
    assert any((value != moved[path]).any() for path, value in clients.items())


def test_clients_without_any_state_have_rows_too(tmp_path):
    specs = (toy.make_specs(targets=())[0],)
    federation = toy_run.federation(specs)
    federation = federation._replace(bases=federation.bases[:1], probe=None)
    args = h2.fedavg(), specs, federation.bases, None
    changes = {"groups": toy_run.GROUPS[:1], "sampling": {"kind": "uniform", "count": 2}}
    programs = Programs(*args, toy_run.config(3, **changes))
    records = {}
    for kind in ("device", "host", "file"):
        config = toy_run.config(3, **changes, store={"kind": kind})
        options = {"method": args[0], "federation": federation, "programs": programs}
        asked = iter([False, False, True])
        toy_run.run(
            tmp_path / kind, config, stop_request=lambda asked=asked: next(asked), **options
        )
        records[kind] = toy_run.run(tmp_path / kind, config, **options).records
        assert all(ok for _, ok, _ in checkpoint.verify(tmp_path / kind))
    assert records["device"] == records["host"] == records["file"]


def test_a_client_without_test_rows_is_left_out_of_every_mean(programs):
    federation = toy_run.federation()
    narrow, wide = federation.test
    counts = np.where(np.arange(5) == 1, 0, narrow.num_examples).astype(np.int32)
    federation = federation._replace(test=(narrow._replace(num_examples=counts), wide))
    result = run(programs, None, federation=federation)
    last = result.records[-1]
    tested = {name: one["accuracy"] for name, one in last["evaluation"]["trained"].items()}
    assert [value is None for value in tested["narrow"]] == [False, True, False, False, False]
    ours = np.mean([value for value in tested["narrow"] if value is not None])
    assert result.final["trained"]["narrow"]["accuracy"] == pytest.approx(ours)
    assert scalars_of(last, {})["trained/narrow/accuracy"] == pytest.approx(ours)
    both = (ours + np.mean(tested["wide"])) / 2
    assert moments.score(last, "accuracy", "trained") == pytest.approx(both)


@pytest.mark.parametrize("devices", [None, 2])
def test_a_base_that_groups_share_is_placed_once(cpu_devices, devices):
    base, other = toy.make_bases()
    shared = {**other, "embed": base["embed"]}
    made, config = toy_run.federation(), toy_run.config(engine={"devices": devices})
    placed = Programs(toy_run.method(), made.specs, (base, base, shared), None, config).bases
    toy.assert_trees_equal(placed, (base, base, shared))
    assert placed[1]["q"] is placed[0]["q"]
    assert placed[2]["embed"] is placed[0]["embed"]
    assert len(placed[2]["q"].devices()) == (devices or 1)


@pytest.mark.parametrize("ids", [range(40), range(8), (3, 39)])
def test_rows_that_all_clients_share_lie_on_the_device_once(programs, ids):
    rows = np.arange(64, dtype=np.float32).reshape(16, 4)
    shared = np.broadcast_to(rows[None], (40, 16, 4))
    held = np.where(np.arange(40) < 39, 16, 7).astype(np.int32)
    feed = Feed(programs, (h2.ClientData({"x": shared}, held),), on_device=True)
    before = sum(array.nbytes for array in jax.live_arrays())
    for _ in range(2):
        found = feed.take(0, np.asarray(ids, np.int32))
        np.testing.assert_array_equal(found.examples["x"], shared[np.asarray(ids)])
        np.testing.assert_array_equal(found.num_examples, held[np.asarray(ids)])
        del found
    assert sum(array.nbytes for array in jax.live_arrays()) - before == rows.nbytes + held.nbytes


@pytest.mark.slow
def test_participants_may_be_split_over_devices(programs, cpu_devices):
    one = run(programs, None, toy_run.config(2))
    two = toy_run.run(None, toy_run.config(2, engine={"devices": 2}))
    toy.assert_trees_close(one.state, two.state)
    with pytest.raises(
        h2.FederationError, match=r"engine.devices: 99 are asked for, and there are 8"
    ):
        toy_run.run(None, toy_run.config(2, engine={"devices": 99}))


def test_the_best_checkpoint_outlasts_the_last_ones(programs, tmp_path):
    kept = {"keep_last": 1, "keep_best": 1, "metric": "loss", "mode": "max"}
    result = run(programs, tmp_path / "run", toy_run.config(4, checkpoints=kept))
    losses = [moments.score(line, "loss", "trained") for line in result.records]
    best = 1 + max(range(4), key=lambda i: losses[i])
    assert best < 4
    assert checkpoint.steps(tmp_path / "run") == [best, 4]


def test_a_schedule_that_names_a_newcomer_is_refused_at_the_start(programs):
    """Also where the federation is not the config's, which knows of three wide clients."""
    federation = toy_run.federation(toy.make_specs())
    sampling = {"kind": "schedule", "schedule": [["narrow/0"], ["wide/3"]]}
    groups = [toy_run.GROUPS[0], {**toy_run.GROUPS[1], "count": 4}]
    config = toy_run.config(3, sampling=sampling, groups=groups)
    handed = []
    with pytest.raises(h2.FederationError, match="round 1 names wide/3, but only the first 3"):
        run(programs, None, config, federation=federation, observers=[handed.append])
    assert handed == []


def test_means_leave_out_what_was_not_measured():
    trained = {"narrow": {"clients": [0, 1], "loss": [1.0, None], "mae": [None, None]}}
    records = [{"round": 0, "evaluation": {"trained": trained}}, {"round": 1}]
    assert last_means(records) == {"trained": {"narrow": {"loss": 1.0, "mae": None}}}
    assert moments.score(records[0], "loss", "trained") == 1.0
    assert moments.score(records[0], "mae", "trained") is None
    assert moments.score(records[1], "loss", "trained") is None
    assert not math.isnan(moments.score(records[0], "loss", "trained") or 0.0)


def test_the_run_remembers_the_folder_that_it_is_given(programs, tmp_path):
    result = run(programs, tmp_path / "run")
    assert result.folder == tmp_path / "run"
    assert RunFolder(result.folder).metrics.is_file()
    assert run(programs, None).folder is None

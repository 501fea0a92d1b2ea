"""Stores: the same bits wherever clients live, on the disk as much as is needed, and no more."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
import toy_run

import h2tune_jax as h2
from h2tune_jax.round import start_clients, start_server
from h2tune_jax.run import checkpoint, programs
from h2tune_jax.run.folder import RunFolder
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.row_store import read_clients
from h2tune_jax.run.rows import Location, Segments, index_array, index_from, layout_of, pack, unpack
from h2tune_jax.types import FederationError

KINDS = ("device", "host", "file")
SETTINGS = {
    "sampling": {"kind": "uniform", "count": 2},
    "evaluation": {
        "batch_size": 4,
        "moments": ("trained", "downloaded"),
        "newcomers": {"count": 1, "steps": 2},
        "every": 2,
        "before": True,
    },
}


@pytest.fixture(scope="module", params=["local", pytest.param("h2tune", marks=pytest.mark.slow)])
def setting(request):
    """Methods that keep an optimiser's state; clients of the second start from what the server sends."""
    method = toy_run.method()
    if request.param == "h2tune":
        method = h2.h2tune(
            learning_rate=0.02, basis="seeded", selection="leading", optimizer_state="kept"
        )
    federation = toy_run.federation()
    config = toy_run.config(6, **SETTINGS)
    return method, federation, Programs(method, *federation[:2], federation.probe, config)


def run(setting, out, kind, rounds=6, observers=(), **changes):
    method, federation, programs = setting
    config = toy_run.config(rounds, **{**SETTINGS, "store": {"kind": kind}, **changes})
    return toy_run.run(
        out, config, method=method, federation=federation, programs=programs, observers=observers
    )


@pytest.fixture(scope="module")
def runs(setting, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {kind: (root / kind, run(setting, root / kind, kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", ["host", "file"])
def test_stores_of_rows_give_what_the_device_gives_bit_for_bit(runs, kind):
    (home, ours), (expected_home, expected) = runs[kind], runs["device"]
    assert (home / "metrics.jsonl").read_bytes() == (expected_home / "metrics.jsonl").read_bytes()
    assert checkpoint.state_digest(ours.state.server) == checkpoint.state_digest(
        expected.state.server
    )
    for cohort in range(2):
        ids, found = read_clients(home, cohort)
        assert 2 <= len(ids) < expected.config.groups[cohort].count
        chosen, wanted = read_clients(expected_home, cohort, ids)
        np.testing.assert_array_equal(chosen, ids)
        assert checkpoint.state_digest(found) == checkpoint.state_digest(wanted)
        state = checkpoint.flatten(expected.state.clients[cohort])
        for path, value in wanted.items():
            np.testing.assert_array_equal(value, state[path][ids])


def test_some_clients_took_part_twice_in_a_row_and_some_after_a_pause(runs):
    """What the test above is about: rows come from the device, from the store, and from the seed."""
    rounds = [line["cohorts"]["narrow"]["clients"] for line in runs["file"][1].records[1:]]
    pairs = [set(a) & set(b) for a, b in itertools.pairwise(rounds)]
    assert any(pairs)
    returned = [
        set(rounds[i]) & set().union(*rounds[: i - 1]) - set(rounds[i - 1]) for i in range(2, 6)
    ]
    assert any(returned)


@pytest.mark.parametrize("kind", ["host", "file"])
def test_what_lies_on_the_disk_is_what_checkpoints_need(runs, kind):
    home = RunFolder(runs[kind][0])
    needed = set()
    for step in checkpoint.steps(home):
        needed |= set(checkpoint.read_manifest(home, step)["beside"]) - {"metrics.jsonl"}
    there = {f"clients/{path.name}" for path in home.clients.iterdir()}
    assert there == needed
    for step, ok, reason in checkpoint.verify(home):
        assert ok, (step, reason)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_after_any_round_goes_on_bit_for_bit(setting, runs, tmp_path, kind):
    out = tmp_path / "run"
    for stops in range(1, 8):
        asked = iter([False] * (1 + stops % 2) + [True] * 10)
        method, federation, programs = setting
        result = toy_run.run(
            out,
            toy_run.config(6, **{**SETTINGS, "store": {"kind": kind}}),
            method=method,
            federation=federation,
            programs=programs,
            stop_request=lambda asked=asked: next(asked),
        )
        if result.reason == "complete":
            break
    assert stops > 3
    assert (out / "metrics.jsonl").read_bytes() == (runs[kind][0] / "metrics.jsonl").read_bytes()
    for cohort in range(2):
        one, other = read_clients(out, cohort)[1], read_clients(runs[kind][0], cohort)[1]
        assert checkpoint.state_digest(one) == checkpoint.state_digest(other)


def test_in_memory_the_host_store_needs_no_folder_and_the_file_store_does(setting, runs):
    found = run(setting, None, "host")
    assert found.records == runs["device"][1].records
    with pytest.raises(FederationError, match="store 'file' needs a run folder"):
        run(setting, None, "file")


def test_disk_stays_bounded_when_the_same_clients_train_again_and_again(setting, tmp_path):
    """Two of four clients a round: without collecting, 20 rounds would leave 40 rows."""
    sizes = []

    def watch(event):
        if type(event).__name__ == "Saved":
            folder = RunFolder(tmp_path / "run").clients
            sizes.append(sum(path.stat().st_size for path in folder.glob("0-*")))

    changes = {
        "checkpoints": {"every": 4, "keep_last": 1, "keep_best": 0},
        "evaluation": {**SETTINGS["evaluation"], "every": 0, "before": False},
    }
    run(setting, tmp_path / "run", "file", rounds=20, observers=[watch], **changes)
    _, rows = read_clients(tmp_path / "run", 0)
    row = sum(value[0].nbytes for value in rows.values())
    # Four clients live, as much again stale, and what the one kept checkpoint and rounds under way add.
    assert max(sizes) <= (4 + 4 + 4 + 4) * row
    assert min(sizes) >= 4 * row


def test_a_client_starts_the_same_whoever_starts_beside_it(setting):
    method, federation, _ = setting
    key = jax.random.key(3)
    server = start_server(method, federation.specs, federation.bases, federation.probe, key)
    whole = h2.init_round(method, federation.specs, federation.bases, federation.probe, key)
    toy.assert_trees_close(server, whole.server)
    start = lambda ids: start_clients(
        method, federation.specs, federation.bases[0], server, 0, jnp.asarray(ids, jnp.int32), key
    )
    one, other = start([0, 1, 2, 3, 4]), start([3, 0, 3, 1, 4])
    toy.assert_trees_close(one, whole.clients[0])
    order = np.asarray([3, 0, 3, 1, 4])
    toy.assert_trees_equal(jax.tree.map(lambda leaf: leaf[order], one), other)


def test_rows_hold_every_type_bit_for_bit():
    rng = np.random.default_rng(0)
    clients = {
        "a": jnp.asarray(rng.normal(size=(3, 2, 2)), jnp.float32),
        "h": jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16),
        "flag": jnp.asarray([True, False, True]),
        "none": jnp.zeros((3, 0)),
        "count": jnp.arange(3, dtype=jnp.int32),
    }
    layout = layout_of(jax.tree.map(lambda leaf: leaf[0], clients))
    assert layout.row_bytes == 4 * 4 + 5 * 2 + 1 + 4
    rows = pack(layout, 3, clients)
    back = unpack(layout, 4, [(3, rows[0]), (0, rows[2]), (2, rows[1])])
    for name, leaf in clients.items():
        assert back[name].dtype == leaf.dtype
        np.testing.assert_array_equal(back[name][jnp.asarray([3, 2, 0])], leaf)
        assert not np.asarray(back[name][1]).any()


def test_segments_never_share_a_number_and_go_when_nobody_needs_them(tmp_path):
    segments = Segments(tmp_path / "clients", 0, 2)
    first = segments.write([np.asarray([1, 2], np.uint8), np.asarray([3, 4], np.uint8)])
    second = Segments(tmp_path / "clients", 0, 2).write([np.asarray([5, 6], np.uint8)])
    assert (first, second) == (0, 1)
    assert segments.marks[0].sha256 == checkpoint.file_digest(segments.path(0))
    index = {9: Location(0, 1), 4: Location(1, 0), 7: Location(0, 0)}
    assert index_from(index_array(index)) == index
    found = dict(segments.read(list(index.items())))
    assert {c: row.tolist() for c, row in found.items()} == {9: [3, 4], 4: [5, 6], 7: [1, 2]}
    segments.keep({segments.name(1)})
    assert [path.name for path in segments.home.iterdir()] == ["0-000001.rows"]
    assert index_from(index_array({})) == {}


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_rows_are_taken_and_put_where_they_belong(backend, monkeypatch):
    """Written in two ways, for hosts and accelerators; both can run here."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    take, put = programs.take_rows.__wrapped__, programs.put_rows.__wrapped__  # type: ignore
    tree = {"x": jnp.arange(12.0).reshape(6, 2), "n": jnp.arange(6)}
    rows = take(tree, np.asarray([4, 0, 4], np.int32))
    np.testing.assert_array_equal(rows["n"], [4, 0, 4])
    source, place = np.asarray([2, 0, 0], np.int32), np.asarray([1, 5, 3], np.int32)
    source, place = jnp.asarray(source), jnp.asarray(place)
    after = put(tree, {"x": -jnp.ones((3, 2)), "n": jnp.asarray([7, 8, 9])}, source, place, 2)
    np.testing.assert_array_equal(after["n"], [0, 9, 2, 3, 4, 7])
    np.testing.assert_array_equal(after["x"][5], [-1, -1])
    np.testing.assert_array_equal(after["x"][3], [6, 7])

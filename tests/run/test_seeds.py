"""Seeds that run together: each what it would be alone, in a folder of its own."""

import shutil

import jax
import numpy as np
import pytest
import toy
import toy_run

from h2tune_jax.run import checkpoint, write_checkpoint
from h2tune_jax.run.events import Finished, Notice, Started
from h2tune_jax.run.folder import RunError, RunFolder
from h2tune_jax.run.loop import simulate
from h2tune_jax.run.notices import read_notices
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.records import read_lines
from h2tune_jax.run.seeds import APART, meeting_points, simulate_seeds
from h2tune_jax.types import FederationError

SEEDS = (3, 8)


def federations():
    """One cohort; the same bases, data of each seed's own."""
    specs = toy.make_specs()[:1]
    found = []
    for seed in SEEDS:
        data = jax.tree.map(np.array, toy.make_data(specs, seed=seed))
        whole = toy_run.federation(specs)
        found.append(whole._replace(bases=whole.bases[:1], probe=None, train=data, test=data))
    return found


def config(**changes):
    changes = {"sampling": {"kind": "uniform", "count": 3}, "groups": toy_run.GROUPS[:1], **changes}
    return toy_run.config(4, **changes)


@pytest.fixture(scope="module")
def programs():
    first = federations()[0]
    return Programs(toy_run.method(), first.specs, first.bases, None, config())


def together(programs, outs, settings=None, **options):
    settings = config() if settings is None else settings
    return simulate_seeds(
        settings,
        SEEDS,
        outs,
        federations=federations(),
        method=programs.method,
        programs=programs,
        **options,
    )


@pytest.fixture(scope="module")
def whole(programs, tmp_path_factory):
    root = tmp_path_factory.mktemp("seeds")
    outs = [root / str(seed) for seed in SEEDS]
    return outs, together(programs, outs)


def test_each_seed_is_what_it_is_alone(whole):
    for seed, result, federation in zip(SEEDS, whole[1], federations()):
        alone = simulate(
            config().model_copy(update={"seed": seed}),
            federation=federation,
            method=toy_run.method(),
        )
        assert result.config.seed == seed
        toy.assert_trees_close(result.state, alone.state)
        for ours, expected in zip(result.records, alone.records, strict=True):
            mine, other = ours["cohorts"]["narrow"], expected["cohorts"]["narrow"]
            assert mine["clients"] == other["clients"]
            np.testing.assert_allclose(mine["loss"], other["loss"], rtol=1e-5)
    drawn = [result.records[0]["cohorts"]["narrow"]["clients"] for result in whole[1]]
    assert drawn[0] != drawn[1]


def test_each_seed_has_a_run_folder_of_its_own(whole):
    for out, result in zip(*whole):
        assert read_lines(out / "metrics.jsonl") == result.records
        assert checkpoint.verify(out) == [(step, True, "") for step in (2, 3, 4)]
        state, _, _ = checkpoint.restore_state(out, result.state)
        toy.assert_trees_equal(state, result.state)


def cut_short(programs, tmp_path):
    """Folders of both seeds, interrupted after two rounds."""
    outs = [tmp_path / str(seed) for seed in SEEDS]
    asked = iter([False] * 2 + [True])
    cut = together(programs, outs, stop_request=lambda: next(asked))
    assert [(result.reason, len(result.records)) for result in cut] == [("interrupted", 2)] * 2
    return outs


def damage(out, step):
    manifest = out / "checkpoints" / f"{step:06d}" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-5])


def texts(out):
    return [notice["text"] for notice in read_notices(RunFolder(out))]


@pytest.mark.parametrize("ahead", [None, 0, 1, "damaged"])
def test_a_set_that_was_interrupted_goes_on_bit_for_bit(programs, whole, tmp_path, ahead, capsys):
    """Also where a kill came between the saves of the two, or the newest of one does not verify."""
    outs = cut_short(programs, tmp_path)
    if ahead == "damaged":
        damage(outs[1], 2)
    elif ahead is not None:
        write_checkpoint.prune(RunFolder(outs[1 - ahead]), [1])
    told, first = [[], []], 2 if ahead is None else 1
    again = together(programs, outs, resume=True, observers=[[events.append] for events in told])
    printed = capsys.readouterr().err
    for out, expected, result, straight, events in zip(outs, whole[0], again, whole[1], told):
        assert (out / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
        toy.assert_trees_equal(result.state, straight.state)
        (started,) = [event for event in events if isinstance(event, Started)]
        assert started.first_round == first
        assert isinstance(events[-1], Finished)
        # Every seed's folder tells its own story, and so does standard error.
        assert texts(out)[0] == (
            "interrupted after 2 rounds; go on with: the same seeds together (3, 8)"
        )
        assert texts(out)[-1] == f"goes on from the checkpoint of round {first}"
        assert f"h2tune: {out}: goes on from the checkpoint of round {first}\n" in printed
    gave_up = "gives up the checkpoint of round 2, to go on in step with the other seeds"
    assert [gave_up in texts(out) for out in outs] == [
        ahead in (0, "damaged"), ahead == 1
    ]  # fmt: skip
    aside = [text for out in outs for text in texts(out) if "does not verify" in text]
    assert len(aside) == (ahead == "damaged")
    for text in aside:
        assert text.startswith("the checkpoint of round 2 does not verify (manifest.json cannot be")
        assert text.endswith("; it was set aside as broken-000002")
    once_more = together(programs, outs, resume=True)
    assert [result.records for result in once_more] == [result.records for result in again]


@pytest.mark.slow
def test_seeds_without_a_common_round_are_told_so_and_catch_up(programs, whole, tmp_path):
    outs = cut_short(programs, tmp_path)
    write_checkpoint.prune(RunFolder(outs[0]), [1])
    write_checkpoint.prune(RunFolder(outs[1]), [2])
    again = together(programs, outs, resume=True)
    for out, result, straight, first in zip(outs, again, whole[1], (1, 2)):
        toy.assert_trees_close(result.state, straight.state)
        assert texts(out)[1:] == [APART, f"goes on from the checkpoint of round {first}"]


def test_a_seed_without_a_good_checkpoint_stops_the_set_and_nothing_is_lost(programs, tmp_path):
    outs = cut_short(programs, tmp_path)
    for step in (1, 2):
        damage(outs[1], step)
    with pytest.raises(RunError, match=r"has checkpoints, and none of them verifies: .*round 2"):
        together(programs, outs, resume=True)
    assert [checkpoint.steps(out) for out in outs] == [[1, 2], [1, 2]]
    assert len(read_lines(outs[1] / "metrics.jsonl")) == 2


def test_where_seeds_meet(tmp_path):
    """A first checkpoint may be given up for a seed that has none yet; more than that may not."""
    every_two = config(checkpoints={"every": 2})
    homes = [tmp_path / "one", tmp_path / "other"]
    settings = [every_two, every_two]
    assert meeting_points(settings, homes) == ([0, 0], False)
    assert meeting_points(settings, [None, None]) == ([0, 0], False)
    write_checkpoint.save(RunFolder(homes[0]), 2, {}, {})
    assert meeting_points(settings, homes) == ([0, 0], False)
    write_checkpoint.save(RunFolder(homes[0]), 3, {}, {})
    assert meeting_points(settings, homes) == ([None, None], True)
    write_checkpoint.save(RunFolder(homes[1]), 2, {}, {})
    assert meeting_points(settings, homes) == ([2, 2], False)
    damage(homes[1], 2)
    assert meeting_points(settings, homes) == ([None, None], True)


def test_a_finished_seed_keeps_what_it_has_beside_a_fresh_one(programs, whole, tmp_path):
    outs = [tmp_path / str(seed) for seed in SEEDS]
    shutil.copytree(whole[0][0], outs[0])
    finished, fresh = together(programs, outs, resume=True)
    assert finished.records == whole[1][0].records
    assert checkpoint.steps(outs[0]) == [2, 3, 4]
    assert (outs[0] / "metrics.jsonl").read_bytes() == (whole[0][0] / "metrics.jsonl").read_bytes()
    assert len(fresh.records) == 4


def test_a_seed_taken_out_of_its_set_is_told_so(whole, tmp_path):
    told = []
    simulate(
        config().model_copy(update={"seed": SEEDS[0]}),
        out=whole[0][0],
        resume=True,
        federation=federations()[0],
        method=toy_run.method(),
        observers=[told.append],
    )
    (notice,) = [event for event in told if isinstance(event, Notice)]
    assert "was begun together with the seeds [3, 8]" in notice.text


@pytest.mark.slow
def test_seeds_may_stop_early_one_by_one(programs):
    stop = {"metric": "loss", "mode": "min", "patience": 1, "min_delta": 0.05}
    results = together(programs, None, config(stop=stop))
    for seed, result, federation in zip(SEEDS, results, federations()):
        alone = simulate(
            config(stop=stop).model_copy(update={"seed": seed}),
            federation=federation,
            method=toy_run.method(),
        )
        assert (result.reason, len(result.records)) == (alone.reason, len(alone.records))


def test_what_cannot_run_together_is_said(programs):
    with pytest.raises(FederationError, match="each once, got"):
        simulate_seeds(config(), (1, 1), method=toy_run.method())
    with pytest.raises(FederationError, match="with store 'device' on one device only"):
        together(programs, None, config(store={"kind": "host"}))
    others = federations()
    others[1] = others[1]._replace(bases=jax.tree.map(lambda leaf: leaf + 1, others[1].bases))
    with pytest.raises(FederationError, match="only on the same frozen weights"):
        simulate_seeds(config(), SEEDS, federations=others, method=toy_run.method())
    others = federations()
    cut = lambda leaf: leaf[:, :-1] if leaf.ndim > 1 else leaf
    others[1] = others[1]._replace(train=jax.tree.map(cut, others[1].train))
    with pytest.raises(FederationError, match="room for equally many examples"):
        simulate_seeds(config(), SEEDS, federations=others, method=toy_run.method())
    others[1] = toy_run.federation(toy.make_specs(alpha=3.0)[:1])
    with pytest.raises(FederationError, match="only where their groups are alike"):
        simulate_seeds(config(), SEEDS, federations=others, method=toy_run.method())

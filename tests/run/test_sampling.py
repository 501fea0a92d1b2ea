"""Who takes part: by seed and round alone, in the right numbers and with the right chances."""

import numpy as np
import pytest

from h2tune_jax.run.sampling import check_schedule, in_training, participants
from h2tune_jax.run.settings import SamplingConfig
from h2tune_jax.types import FederationError

NAMES, COUNTS = ("narrow", "wide"), (40, 3)


def draw(sampling, *, seed=1, round_index=0, weights=None, names=NAMES, counts=COUNTS):
    weights = tuple(np.ones(c, np.float32) for c in counts) if weights is None else weights
    return participants(
        sampling, names=names, counts=counts, weights=weights, seed=seed, round_index=round_index
    )


def test_all_take_part_in_order():
    for ids, count in zip(draw(SamplingConfig()), COUNTS):
        np.testing.assert_array_equal(ids, np.arange(count))
        assert ids.dtype == np.int32


def test_uniform_draws_are_fixed_by_seed_round_and_name():
    sampling = SamplingConfig(kind="uniform", count=5)
    narrow, wide = draw(sampling)
    assert len(set(narrow.tolist())) == 5
    assert (np.diff(narrow) > 0).all()
    np.testing.assert_array_equal(wide, np.arange(3))  # it has fewer than 5
    # These numbers may never change: a resumed run draws the same clients.
    np.testing.assert_array_equal(narrow, draw(sampling)[0])
    np.testing.assert_array_equal(narrow, draw(sampling, names=("narrow",), counts=(40,))[0])
    others = [
        draw(sampling, seed=2)[0],
        draw(sampling, round_index=1)[0],
        draw(sampling, names=("other", "wide"))[0],
    ]
    assert all((narrow != other).any() for other in others)


def test_the_draw_of_today_is_the_draw_of_tomorrow():
    narrow, _ = draw(SamplingConfig(kind="uniform", count=6), seed=3, round_index=2)
    assert narrow.tolist() == PINNED


PINNED = [11, 12, 15, 16, 23, 37]


def test_uniform_draws_are_uniform():
    sampling = SamplingConfig(kind="uniform", fraction=0.1)
    seen = np.zeros(40)
    for index in range(2000):
        ids = draw(sampling, round_index=index)[0]
        assert len(ids) == 4
        seen[ids] += 1
    # Each count is binomial(2000, 0.1): five standard deviations are 67.
    assert np.abs(seen - 200).max() < 67


def test_weights_are_chances_and_weight_zero_is_never_drawn():
    weights = np.asarray([1, 2, 3, 0], np.float32), np.ones(3, np.float32)
    sampling = SamplingConfig(kind="weight", count=1)
    seen = np.zeros(4)
    for index in range(3000):
        seen[draw(sampling, counts=(4, 3), weights=weights, round_index=index)[0]] += 1
    expected = 3000 * np.asarray([1, 2, 3, 0]) / 6
    # Five standard deviations of the largest count: 5 * sqrt(3000 / 4) = 137.
    assert np.abs(seen - expected).max() < 137
    assert seen[3] == 0
    many = draw(SamplingConfig(kind="weight", count=4), counts=(4, 3), weights=weights)[0]
    assert many.tolist() == [0, 1, 2]


def test_a_schedule_names_clients_and_begins_again():
    sampling = SamplingConfig(
        kind="schedule", schedule=(("narrow/3", "wide/1", "narrow/0"), ("wide/2",))
    )
    for index in (0, 2):
        narrow, wide = draw(sampling, round_index=index)
        assert (narrow.tolist(), wide.tolist()) == ([0, 3], [1])
    narrow, wide = draw(sampling, round_index=1)
    assert (narrow.tolist(), wide.tolist()) == ([], [2])
    assert narrow.dtype == np.int32


def test_newcomers_are_the_last_of_each_group_and_leave_somebody():
    assert in_training((5, 3), 2, NAMES) == (3, 1)
    with pytest.raises(FederationError, match=r"group 'wide'.*count = 3 leaves none of 3 clients"):
        in_training((5, 3), 3, NAMES)


@pytest.mark.parametrize(
    ("client", "words"),
    [
        ("wide/2", r"round 1 names wide/2, but only the first 2 clients of group 'wide' train"),
        ("wild/0", r"round 1 names 'wild/0', which is no client; .*did you mean 'wide'"),
        ("wide", r"round 1 names 'wide', which is no client"),
        ("wide/-1", r"round 1 names 'wide/-1', which is no client"),
    ],
)
def test_a_schedule_is_held_against_those_who_train(client, words):
    sampling = SamplingConfig(kind="schedule", schedule=(("wide/1",), ("narrow/4", client)))
    with pytest.raises(FederationError, match=words):
        check_schedule(sampling, NAMES, (5, 2))
    check_schedule(SamplingConfig(), NAMES, (5, 2))

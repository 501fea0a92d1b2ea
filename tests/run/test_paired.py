import numpy as np
import pytest
from scipy import stats

from h2tune_jax.run.paired import OVERALL, Score, compare_scores, paired_interval


def score(method, seed, **values):
    return Score(method, seed, {group: ("accuracy", value) for group, value in values.items()})


def test_interval_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653.
    found = paired_interval([1, 2, 3])
    assert found.mean == 2
    assert found.num_seeds == 3
    assert found.high == pytest.approx(2 + 4.302652729911275 / 3**0.5, rel=1e-9)
    assert found.low == pytest.approx(2 - 4.302652729911275 / 3**0.5, rel=1e-9)


def test_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 7))
    found = paired_interval(one - other)
    theirs = stats.ttest_rel(one, other).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], theirs, rtol=1e-9)


def test_one_seed_has_no_interval():
    assert paired_interval([0.5])[:3] == (0.5, None, None)


def test_pairs_are_those_of_equal_seed():
    # By seed the gaps are 0.1 and 0.3; paired in another order they would be equal.
    scores = [
        score("h2tune", 0, a=0.5), score("h2tune", 1, a=0.9),
        score("local", 1, a=0.6), score("local", 0, a=0.4), score("local", 2, a=0.0),
    ]  # fmt: skip
    rows = {row.method: row for row in compare_scores(scores).rows}
    gap = rows["h2tune"].difference
    assert gap.mean == pytest.approx(0.2)
    assert gap.high - gap.mean == pytest.approx(12.706204736432095 * 0.1, rel=1e-9)
    assert rows["local"].difference is None
    assert rows["local"].seeds == (0, 1, 2)
    assert rows["local"].mean == pytest.approx(1 / 3)


def test_baseline_is_local_or_the_first():
    scores = [score("h2tune", 0, a=0.5), score("local", 0, a=0.4)]
    assert compare_scores(scores).baseline == "local"
    assert compare_scores(scores[:1]).baseline == "h2tune"
    assert compare_scores(scores, "h2tune").rows[1].difference.mean == pytest.approx(-0.1)


def test_groups_weigh_the_same_overall():
    scores = [score("h2tune", 0, a=0.5, b=0.9), score("local", 0, a=0.4, b=0.4)]
    rows = [row for row in compare_scores(scores).rows if row.group == OVERALL]
    assert [row.mean for row in rows] == [pytest.approx(0.7), pytest.approx(0.4)]
    assert rows[0].difference.mean == pytest.approx(0.3)


def test_different_metrics_have_no_overall_mean():
    mixed = Score("h2tune", 0, {"a": ("accuracy", 0.5), "b": ("loss", 2.0)})
    assert {row.group for row in compare_scores([mixed]).rows} == {"a", "b"}

"""Plots come from rows, and the same rows give the same file."""

import numpy as np
import pytest

from h2tune_jax.study.plot import Curve, Panel, draw_rates

pytest.importorskip("matplotlib")


def panels():
    x = 2 ** np.arange(4, 9)
    values = x[:, None] ** -0.5 * (1 + 0.1 * np.random.default_rng(0).normal(size=(5, 8)))
    gone = values.copy()
    gone[2:] = np.inf
    return [
        Panel("one", [Curve("c = 1", x, values), Curve("c = 9", x, gone)], "cut to T <= 256"),
        Panel("two", [Curve("c = 300", x, np.full((5, 8), np.nan))]),
    ]


def test_a_plot_is_written_and_is_the_same_again(tmp_path):
    files = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in files:
        draw_rates(path, panels(), x="rounds T", y="mean squared gradients")
    assert files[0].read_bytes() == files[1].read_bytes()
    text = files[0].read_text()
    assert text.count("<svg") == 1
    # Text is drawn as shapes; its wording stands in comments.
    for words in ("cut to T &lt;= 256", "1/sqrt T", "c = 300 (diverged)", "rounds T"):
        assert words.replace("&lt;", "<") in text or words in text

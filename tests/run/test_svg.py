import re
from xml.etree import ElementTree

import numpy as np
import pytest

from h2tune_jax.run.report.html import Html, table, tag
from h2tune_jax.run.report.svg import (
    Band,
    Bar,
    Guide,
    Line,
    heat_map,
    interval_chart,
    line_chart,
    shrink,
    ticks,
)


def parse(drawing):
    return ElementTree.fromstring(drawing)


def paths(drawing, kind):
    return [e for e in parse(drawing).iter("path") if kind in e.get("class").split()]


def covered(path):
    """Area of the boxes that a path draws."""
    boxes = re.findall(r"M[\d.]+ [\d.]+h([\d.]+)v([\d.]+)h-[\d.]+z", path.get("d"))
    assert "".join(re.findall(r"[Mhvz]", path.get("d"))) == "Mhvhz" * len(boxes)
    return sum(float(w) * float(h) for w, h in boxes)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.23, 0.61, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        (-3, 12, [-5, 0, 5, 10, 15]),
        (0, 10000, [0, 2000, 4000, 6000, 8000, 10000]),
    ],
)
def test_ticks_are_round_and_cover(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -5.0, 1e-9, 1e12])
def test_ticks_of_one_value_surround_it(value):
    found = ticks(value, value)
    assert found[0] <= value <= found[-1]
    assert len(set(found)) == len(found) > 1


def test_a_curve_goes_through_its_points():
    drawing = line_chart("x", [Line("a", [0, 1, 2], [0.0, 0.5, 1.0])], percent=True)
    (curve,) = paths(drawing, "curve")
    points = np.array([p.split() for p in curve.get("d")[1:].split("L")], float)
    # Equal steps across, equal steps up.
    np.testing.assert_allclose(np.diff(points[:, 0], 2), 0, atol=0.11)
    np.testing.assert_allclose(np.diff(points[:, 1], 2), 0, atol=0.11)
    assert points[0, 1] > points[-1, 1]


def test_a_curve_breaks_where_nothing_is_known():
    drawing = line_chart("x", [Line("a", [0, 1, 2, 3, 4], [1, 2, float("nan"), 3, 4])])
    (curve,) = paths(drawing, "curve")
    assert curve.get("d").count("M") == 2


def test_a_single_point_is_drawn():
    drawing = line_chart("x", [Line("a", [3], [0.5], thin=True)])
    assert len(list(parse(drawing).iter("circle"))) == 1


def test_nothing_known_is_still_a_drawing():
    assert parse(line_chart("x", [Line("a", [0], [float("nan")])])).tag == "svg"
    assert parse(line_chart("x", [])).tag == "svg"


def test_long_curves_stay_small_and_keep_their_end():
    rounds = list(range(100_000))
    drawing = line_chart("x", [Line("a", rounds, [float(r) for r in rounds])])
    assert len(drawing) < 10_000
    (curve,) = paths(drawing, "curve")
    assert float(curve.get("d").split("L")[-1].split()[0]) == pytest.approx(326, abs=0.1)


def test_bands_and_guides_are_drawn():
    band = Band("b", [0, 1], [0.1, 0.2], [0.3, 0.5])
    drawing = line_chart("x", [], bands=[band], guides=[Guide("g", 0.9)])
    assert len(paths(drawing, "band")) == 1
    assert sum(e.get("class") == "guide" for e in parse(drawing).iter("line")) == 1


def test_heat_map_has_a_cell_for_every_entry():
    values = np.array([[1.0, -1.0, 0.0], [0.5, float("nan"), 0.5]])
    drawing = heat_map("x", values, row_label="r", column_label="c")
    full = 26.0 * 26.0
    areas = {}
    for path in [e for e in parse(drawing).iter("path") if "cell" in e.get("class")]:
        kind = path.get("class").split()[1], path.get("fill-opacity")
        areas[kind] = covered(path) / full
    assert areas == {
        ("pos", "1.0"): pytest.approx(1),
        ("neg", "1.0"): pytest.approx(1),
        ("pos", "0.5"): pytest.approx(2),
        ("none", None): pytest.approx(1),
    }


def test_heat_map_of_zeros():
    assert not paths(heat_map("x", np.zeros((3, 3)), row_label="r", column_label="c"), "cell")


def test_large_matrices_are_averaged_without_loss():
    values = np.arange(200.0 * 130).reshape(200, 130)
    small = shrink(values)
    assert small.shape == (64, 64)
    rows = np.diff([*np.unique(np.linspace(0, 200, 64, endpoint=False).astype(int)), 200])
    columns = np.diff([*np.unique(np.linspace(0, 130, 64, endpoint=False).astype(int)), 130])
    assert (small * rows[:, None] * columns[None]).sum() == pytest.approx(values.sum())
    assert len(heat_map("x", values, row_label="r", column_label="c")) < 150_000


def test_interval_chart_without_interval():
    bars = [Bar("a", 0.1, 0.05, 0.15), Bar("b", -0.2, None, None)]
    spans = [e for e in parse(interval_chart("x", bars, percent=True)).iter("line")
             if "span" in e.get("class")]  # fmt: skip
    assert len(spans) == 1
    assert float(spans[0].get("x1")) < float(spans[0].get("x2"))


def test_text_is_escaped_wherever_it_enters():
    bad = "<script>alert('1')</script>\"&"
    for built in (
        tag("p", bad),
        tag("p", title=bad),
        table([bad, bad], [[bad, bad]], caption=bad),
        line_chart(bad, [Line(bad, [0], [1])]),
        heat_map(bad, np.ones((2, 2)), row_label=bad, column_label=bad),
    ):
        assert "<script" not in built
        assert "&lt;script&gt;" in built
    assert tag("p", Html("<b>x</b>")) == "<p><b>x</b></p>"

"""Charts as inline SVG. Colours come from the page's style sheet, so that dark mode has its own.

Drawings are 340 units wide: at that width a phone shows them at their natural size, so their letters
stay readable there. Every colour goes with a dash pattern, and with a name in the legend.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from h2tune_jax.run.numbers import plain
from h2tune_jax.run.report.html import Html, join, tag

WIDTH = 340
NUM_COLOURS = 6
LEVELS = 10
MOST_POINTS = 200
MOST_CELLS = 64
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 34


Numbers = Sequence[float] | np.ndarray


class Line(NamedTuple):
    """A curve; where y is not finite it is broken."""

    label: str
    x: Numbers
    y: Numbers
    colour: int = 0
    thin: bool = False


class Band(NamedTuple):
    """The area between two curves."""

    label: str
    x: Numbers
    low: Numbers
    high: Numbers
    colour: int = 0


class Guide(NamedTuple):
    """A level to compare with."""

    label: str
    y: float


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    bands: Sequence[Band] = (),
    guides: Sequence[Guide] = (),
    x_label: str = "rounds done",
    percent: bool = False,
    from_zero: bool = False,
    height: int = 210,
) -> Html:
    """Draw curves over rounds. `name` is what a screen reader says."""
    xs = [x for item in (*lines, *bands) for x in item.x]
    ys = [y for line in lines for y in line.y] + [guide.y for guide in guides]
    ys += [y for band in bands for side in (band.low, band.high) for y in side]
    ys = [y for y in ys if y is not None and math.isfinite(y)]
    y_ticks = ticks(min([*ys, *[0.0] * from_zero]), max(ys)) if ys else [0.0, 1.0]
    x_ticks = [t for t in ticks(min(xs), max(xs)) if float(t).is_integer()] if xs else [0.0]
    x_low, x_high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    y_low, y_high = min([*ys, y_ticks[0]]), max([*ys, y_ticks[-1]])
    right, bottom = WIDTH - _RIGHT, height - _BOTTOM

    def across(x: float) -> float:
        # A single round sits in the middle.
        part = 0.5 if x_high == x_low else (x - x_low) / (x_high - x_low)
        return _LEFT + 6 + part * (right - _LEFT - 12)

    def up(y: float) -> float:
        return bottom - (y - y_low) / ((y_high - y_low) or 1) * (bottom - _TOP)

    parts = []
    for y in y_ticks:
        at = f"{up(y):.1f}"
        parts.append(tag("line", class_="rule", x1=_LEFT, x2=right, y1=at, y2=at))
        text = f"{100 * y:.4g}%" if percent else _short(y)
        parts.append(tag("text", text, x=_LEFT - 5, y=f"{up(y) + 4:.1f}", text_anchor="end"))
    for x in x_ticks:
        if x_low <= x <= x_high:
            parts.append(
                tag("text", f"{x:.0f}", x=f"{across(x):.1f}", y=bottom + 15, text_anchor="middle")
            )
    middle = (_LEFT + right) / 2
    parts.append(tag("text", x_label, x=middle, y=height - 4, text_anchor="middle", class_="axis"))
    for band in bands:
        there = [
            (across(x), up(low), up(high))
            for x, low, high in _thin(list(zip(band.x, band.low, band.high)))
            if all(v is not None and math.isfinite(v) for v in (low, high))
        ]
        if there:
            way = [(x, y) for x, _, y in there] + [(x, y) for x, y, _ in reversed(there)]
            parts.append(
                tag("path", class_=f"band c{band.colour % NUM_COLOURS}", d=_way(way) + "z")
            )
    for guide in guides:
        at = f"{up(guide.y):.1f}"
        ends = {"x1": _LEFT, "x2": right, "y1": at, "y2": at}
        parts.append(tag("line", class_="guide", **ends))
    # Thin curves first: the means lie on top of them.
    for line in sorted(lines, key=lambda line: not line.thin):
        parts.append(_curve(line, across, up))
    return _drawing(name, height, parts)


def _curve(line: Line, across, up) -> Html:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in _thin(list(zip(line.x, line.y))):
        if y is None or not math.isfinite(y):
            pieces.append([])
        else:
            pieces[-1].append((across(x), up(y)))
    pieces = [piece for piece in pieces if piece]
    colour = f"c{line.colour % NUM_COLOURS}"
    kind = "thin" if line.thin else "thick"
    way = "".join(_way(piece) for piece in pieces if len(piece) > 1)
    curve = tag("path", class_=f"curve {kind} {colour}", d=way) if way else None
    points = [point for piece in pieces for point in piece]
    # A curve of few points shows them; one of a single point would not be seen at all.
    alone = [piece[0] for piece in pieces if len(piece) == 1]
    shown = points if len(points) <= 12 and not line.thin else alone
    dots = [
        tag("circle", class_=f"dot {colour}", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2 if line.thin else 3)
        for x, y in shown
    ]
    return tag("g", tag("title", line.label), curve, *dots)


def _way(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _thin(points: list) -> list:
    """Leave out points that no eye could tell apart, but never the last."""
    if len(points) <= MOST_POINTS:
        return points
    stride = -(-len(points) // MOST_POINTS)
    return points[:-1:stride] + points[-1:]


class Bar(NamedTuple):
    """A difference with its interval, on a line of its own."""

    label: str
    value: float
    low: float | None
    high: float | None
    colour: int = 0


def interval_chart(name: str, bars: Sequence[Bar], *, percent: bool) -> Html:
    """Draw differences with their intervals round a line at zero."""
    ends = [v for bar in bars for v in (bar.value, bar.low, bar.high) if v is not None]
    x_ticks = ticks(min([0.0, *ends]), max([0.0, *ends]), most=5)
    low, high = min([*ends, x_ticks[0]]), max([*ends, x_ticks[-1]])
    height = 34 * len(bars) + 40
    left, right = 22, WIDTH - 22  # room for half of the outer numbers
    across = lambda x: left + (x - low) / ((high - low) or 1) * (right - left)
    parts = []
    for x in x_ticks:
        at = f"{across(x):.1f}"
        kind = "guide zero" if x == 0 else "rule"
        parts.append(tag("line", class_=kind, x1=at, x2=at, y1=6, y2=height - 32))
        text = f"{100 * x:+.3g}".replace("-", "−") if percent and x else _short(x)
        parts.append(tag("text", text, x=at, y=height - 18, text_anchor="middle"))
    unit = "percentage points" if percent else "difference"
    parts.append(tag("text", unit, x=WIDTH / 2, y=height - 4, text_anchor="middle", class_="axis"))
    for place, bar in enumerate(bars):
        y = 34 * place + 28
        colour = f"c{bar.colour % NUM_COLOURS}"
        parts.append(tag("text", bar.label, x=left + 4, y=y - 11, class_="label"))
        if bar.low is not None and bar.high is not None:
            span = {"x1": f"{across(bar.low):.1f}", "x2": f"{across(bar.high):.1f}"}
            parts.append(tag("line", class_=f"span {colour}", y1=y, y2=y, **span))
        parts.append(
            tag("circle", class_=f"dot {colour}", cx=f"{across(bar.value):.1f}", cy=y, r=4)
        )
    return _drawing(name, height, parts)


def heat_map(
    name: str,
    values: np.ndarray,  # [rows, columns]
    *,
    row_label: str,
    column_label: str,
    limit: float | None = None,
    square: bool = True,
) -> Html:
    """Draw a matrix: strength by opacity, sign by colour, in ten steps.

    `limit` is the magnitude that is drawn in full; None means the largest there is. Entries that are
    not finite are hatched out. A matrix of more than 64 rows or columns is shown as means of blocks.
    """
    values = shrink(np.asarray(values, np.float64))
    rows, columns = values.shape
    known = np.isfinite(values)
    top = limit or float(np.abs(values[known]).max(initial=0.0)) or 1.0
    room = WIDTH - 34 - 8
    cell = min(room / columns, 26.0 if square else room / columns, 300 / rows)
    left, above = max(34.0, (WIDTH - cell * columns) / 2), 6
    height = round(above + cell * rows + 58)
    levels = np.where(known, np.ceil(np.clip(np.abs(values) / top, 0, 1) * LEVELS - 1e-9), -1)
    parts = [
        tag("rect", class_="ground", x=left, y=above, width=f"{cell * columns:.1f}",
            height=f"{cell * rows:.1f}")
    ]  # fmt: skip
    for sign, colour in ((1, "pos"), (-1, "neg")):
        for level in range(1, LEVELS + 1):
            way = _cells((levels == level) & (np.sign(values) == sign), left, above, cell)
            if way:
                parts.append(
                    tag("path", class_=f"cell {colour}", fill_opacity=level / LEVELS, d=way)
                )
    way = _cells(~known, left, above, cell)
    if way:
        parts.append(tag("path", class_="cell none", d=way))
    parts += _edges(rows, columns, left, above, cell, row_label, column_label)
    signed = bool((values[known] < 0).any())
    parts += _scale(above + cell * rows + 36, left + cell * columns / 2, top, signed)
    return _drawing(name, height, parts)


def _cells(where: np.ndarray, left: float, above: float, cell: float) -> str:
    """Draw cells of one colour as one path, neighbours in a row as one box."""
    way = []
    for row in range(where.shape[0]):
        ends = np.flatnonzero(np.diff(np.concatenate([[False], where[row], [False]])))
        for first, last in zip(ends[::2], ends[1::2]):
            x, y, w = left + first * cell, above + row * cell, (last - first) * cell
            way.append(f"M{x:.4g} {y:.4g}h{w:.4g}v{cell:.4g}h{-w:.4g}z")
    return "".join(way)


def _edges(rows, columns, left, above, cell, row_label, column_label) -> list[Html]:
    parts = []
    for place in _numbered(rows, cell):
        y = above + (place + 0.5) * cell + 4
        parts.append(tag("text", place, x=left - 4, y=f"{y:.1f}", text_anchor="end"))
    for place in _numbered(columns, cell):
        x, y = left + (place + 0.5) * cell, above + cell * rows + 13
        parts.append(tag("text", place, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor="middle"))
    centre = above + cell * rows / 2
    side = left - 24
    turn = f"rotate(-90 {side:.1f} {centre:.1f})"
    parts.append(
        tag("text", row_label, x=f"{side:.1f}", y=f"{centre:.1f}", transform=turn, text_anchor="middle",
            class_="axis")
    )  # fmt: skip
    x, y = left + cell * columns / 2, above + cell * rows + 26
    parts.append(
        tag("text", column_label, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor="middle", class_="axis")
    )
    return parts


def _numbered(count: int, cell: float) -> range:
    """Number as many rows or columns as their numbers have room for."""
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100) if s * cell >= 16 or s == 100)
    return range(0, count, stride)


def _scale(y: float, middle: float, top: float, signed: bool) -> list[Html]:
    parts, steps = [], [(level, "pos") for level in range(1, LEVELS + 1)]
    if signed:
        steps = [(level, "neg") for level in range(LEVELS, 0, -1)] + steps
    x = middle - 4 * len(steps)
    parts.append(tag("text", _signed(-top) if signed else "0", x=x - 4, y=y + 9, text_anchor="end"))
    for level, colour in steps:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": 8, "height": 10}
        parts.append(tag("rect", class_=f"cell {colour}", fill_opacity=level / LEVELS, **place))
        x += 8
    parts.append(tag("text", plain(top), x=f"{x + 4:.1f}", y=y + 9))
    return parts


def _signed(value: float) -> str:
    return plain(value).replace("-", "−")


def shrink(values: np.ndarray, most: int = MOST_CELLS) -> np.ndarray:
    """Average blocks so that at most `most` rows and columns remain; nothing is lost at the edges."""
    for axis in (0, 1):
        count = values.shape[axis]
        if count > most:
            starts = np.unique(np.linspace(0, count, most, endpoint=False).astype(int))
            sizes = np.diff([*starts, count])
            shape = (-1, 1) if axis == 0 else (1, -1)
            values = np.add.reduceat(values, starts, axis=axis) / sizes.reshape(shape)
    return values


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Choose round numbers that cover a range, at steps of 1, 2 or 5."""
    if high <= low:
        reach = abs(low) or 1.0
        low, high = low - 0.05 * reach, high + 0.05 * reach
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """Name what a section's charts are drawn with: (class, text); a class as `c0`, `guide`, `band c0`."""
    items = []
    for kind, text in entries:
        if kind.startswith("band"):
            mark = tag("rect", class_=kind, x=1, y=2, width=26, height=8)
        elif kind == "guide":
            mark = tag("line", class_="guide", x1=1, x2=27, y1=6, y2=6)
        else:
            mark = tag("path", class_=f"curve {kind}", d="M1 6L27 6")
        drawing = tag("svg", mark, viewBox="0 0 28 12", width=28, height=12, aria_hidden="true")
        items.append(tag("li", drawing, " ", text))
    return tag("ul", *items, class_="legend")


def _short(value: float) -> str:
    """Format an axis number in at most six characters."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def _drawing(name: str, height: float, parts: Sequence[Html]) -> Html:
    box = f"0 0 {WIDTH} {height}"
    return tag("svg", tag("title", name), join(parts), viewBox=box, role="img", class_="drawing")

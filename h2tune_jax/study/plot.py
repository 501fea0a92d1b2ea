"""Plots of studies, from their rows (needs the extra `plot`)."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax.run.figure import save_figure
from h2tune_jax.study.rate import interval
from h2tune_jax.types import FederationError


class Curve(NamedTuple):
    """Values over x with the interval of their mean over seeds."""

    label: str
    x: np.ndarray  # [H]
    values: np.ndarray  # [H, seeds]


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    curves: Sequence[Curve]
    note: str = ""  # such as what was cut, and why
    guides: bool = True  # with the lines of the rates


def draw_rates(path: str | os.PathLike, panels: Sequence[Panel], *, x: str, y: str) -> None:
    """Draw means over seeds with 95 % bootstrap intervals, log over log, into a file.

    Panels with `guides` have the lines 1/sqrt T and 1/T through their highest first point. A curve whose
    last values are not finite is named as diverged, and not drawn.
    """
    figure, axes = _axes(len(panels))
    for ax, panel in zip(axes, panels):
        for curve in panel.curves:
            kept = np.isfinite(curve.values).all(axis=1) & (curve.values.mean(axis=1) > 0)
            if not kept.any() or not np.isfinite(curve.values[-1]).all():
                ax.plot([], [], label=f"{curve.label} (diverged)")
                continue
            each = [interval(values) for values in curve.values[kept]]
            at = curve.x[kept]
            (line,) = ax.plot(at, [one.value for one in each], marker="o", ms=3, label=curve.label)
            low = [max(one.low, 1e-30) for one in each]
            ax.fill_between(at, low, [one.high for one in each], alpha=0.25, color=line.get_color())
        if ax.collections:  # a logarithm needs something to scale
            if panel.guides:
                _draw_guides(ax, panel)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
        ax.set(title=panel.title, xlabel=x)
        if panel.note:
            ax.text(0.02, 0.02, panel.note, transform=ax.transAxes, fontsize=7, va="bottom")
        ax.legend(fontsize=7)
        ax.set_ylabel(y)
    save_figure(figure, path)


def _draw_guides(ax: Any, panel: Panel) -> None:
    firsts = [
        (float(curve.values[0].mean()), curve.x)
        for curve in panel.curves
        if len(curve.x) and np.isfinite(curve.values[[0, -1]]).all()
    ]
    if not firsts:
        return
    height, x = max(firsts, key=lambda pair: pair[0])
    for power, style in ((0.5, "--"), (1.0, ":")):
        label = "1/sqrt T" if power == 0.5 else "1/T"
        ax.plot(x, height * (x / x[0]) ** -power, style, color="grey", lw=1, label=label)


def _axes(count: int) -> tuple[Any, list]:
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG  # pyright: ignore
        from matplotlib.figure import Figure  # pyright: ignore
    except ImportError:
        raise FederationError(
            "a plot needs the extra `plot`: pip install 'h2tune-jax[plot]'"
        ) from None
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]

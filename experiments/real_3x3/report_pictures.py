"""The pictures of the report, as SVG without a date: the same rows give the same files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import plan
from plan_types import Setting
from report_rows import Found

from h2tune_jax.run.figure import save_figure
from h2tune_jax.run.paired import paired_interval


def draw(setting: Setting, found: Sequence[Found], path: Path) -> bool:
    """Draw every row's difference, with its interval, to the floor or to what an ablation is against.

    Says whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    against = setting.against or plan.FLOOR
    pick = lambda row: row.over_floor if setting.against is None else row.over_rival
    gaps = [(row.name, pick(row)) for row in found]
    shown = sorted(
        ((name, value) for name, value in gaps if value is not None), key=lambda x: x[1].mean
    )
    if not shown:
        return False
    figure = Figure(figsize=(6.4, 0.9 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, (_, value) in enumerate(shown):
        low = value.mean if value.low is None else value.low
        high = value.mean if value.high is None else value.high
        axes.plot([100 * low, 100 * high], [place, place], color="C0", lw=1.5)
        axes.plot(100 * value.mean, place, "o", color="C0", ms=4)
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_xlabel(f"test accuracy minus {against}, percentage points, 95 % interval")
    axes.set_title(setting.title, fontsize=10)
    save_figure(figure, path)
    return True


def draw_curve(curve: str, points: Mapping[int, Sequence[Found]], path: Path) -> None:
    """Draw every row's accuracy over what is varied; bars are 95 % intervals over seeds, not paired."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.name for found in points.values() for row in found))
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        values, means, below, above = [], [], [], []
        for value, found in sorted(points.items()):
            for row in (row for row in found if row.name == name):
                mean = paired_interval(list(row.scores.values()))
                values.append(value * 1.03 ** (place - 1))  # side by side: bars do not hide others
                means.append(100 * mean.mean)
                below.append(0.0 if mean.low is None else 100 * (mean.mean - mean.low))
                above.append(0.0 if mean.high is None else 100 * (mean.high - mean.mean))
        axes.errorbar(
            values, means, yerr=[below, above], label=name, marker="o", ms=4, lw=1.2, capsize=2
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(points), [str(value) for value in sorted(points)])
    axes.minorticks_off()
    axes.set_xlabel(curve)
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8)
    save_figure(figure, path)

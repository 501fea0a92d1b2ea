"""The pictures of the report, as SVG without a date: the same rows give the same files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import plan
from plan_types import Setting
from report_rows import Found

from h2tune_jax.run.figure import save_figure


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
    for place, (name, value) in enumerate(shown):
        color = "C0" if setting.rows[name].method == setting.judged else "0.45"
        if value.low is None or value.high is None:  # one seed: no interval
            axes.plot(100 * value.mean, place, "o", mec=color, mfc="white", ms=4)
            continue
        axes.plot([100 * value.low, 100 * value.high], [place, place], color=color, lw=1.5)
        axes.plot(100 * value.mean, place, "o", color=color, ms=4)
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_xlabel(f"test accuracy minus {against}, percentage points, 95 % interval")
    axes.set_title(setting.title, fontsize=10)
    save_figure(figure, path)
    return True


def draw_curve(curve: str, points: Mapping[int, Sequence[Found]], path: Path) -> None:
    """Draw accuracies over what is varied, and beside them the differences to the floor, paired by seed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.name for found in points.values() for row in found))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, name in enumerate(names):
        own = [
            (value, row)
            for value, found in sorted(points.items())
            for row in found
            if row.name == name
        ]
        means = [100 * row.mean for _, row in own]
        left.plot(
            [v for v, _ in own], means, color=f"C{place}", label=name, marker="o", ms=4, lw=1.2
        )
        gaps = [(value, row.over_floor) for value, row in own if row.over_floor is not None]
        if gaps:
            # Side by side: bars do not hide others.
            at = [value * 1.03 ** (place - 1) for value, _ in gaps]
            low = [0.0 if gap.low is None else 100 * (gap.mean - gap.low) for _, gap in gaps]
            high = [0.0 if gap.high is None else 100 * (gap.high - gap.mean) for _, gap in gaps]
            middle = [100 * gap.mean for _, gap in gaps]
            right.errorbar(
                at, middle, yerr=[low, high], color=f"C{place}", label=name, marker="o", ms=4,
                lw=1.2, capsize=2,
            )  # fmt: skip
    right.axhline(0, color="0.6", lw=0.8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(points), [str(value) for value in sorted(points)])
        axes.minorticks_off()
        axes.set_xlabel(curve)
    left.set_ylabel("test accuracy, %")
    left.legend(fontsize=8)
    right.set_ylabel(f"minus {plan.FLOOR}, points, 95 %")
    save_figure(figure, path)

"""Make the tables and plots of this folder from the rows in results/; no number is typed by hand.

    python experiments/real_3x3/report.py

Writes results/*.svg and the part of README.md between its markers. Needs the extra `plot`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench
import numpy as np
import plan

from h2tune_jax.run.numbers import difference_of, share
from h2tune_jax.run.paired import Interval, paired_interval

FOLDER = Path(__file__).parent
START, END = "<!-- results -->", "<!-- end of results -->"
METRIC = "accuracy"


class Found(NamedTuple):
    """One row of one setting, on test rows."""

    name: str
    rate: float
    scores: Mapping[int, float]  # by seed: mean accuracy over clients
    by_task: Mapping[str, float]  # mean over its clients and all seeds
    numbers_up: float  # a client and round
    seconds: float  # a run, median over its seeds


def found_of(setting: plan.Setting, lines: Sequence[Mapping[str, Any]]) -> list[Found]:
    """Collect what was measured of each row."""
    found = []
    for name in setting.rows:
        own = [line for line in lines if (line["row"], line["split"]) == (name, "test")]
        if not own:
            continue
        seeds = sorted({line["seed"] for line in own})
        mean = lambda chosen: float(np.mean([line["accuracy"] for line in chosen]))
        tasks = dict.fromkeys(task_of(line["client"]) for line in own)
        found.append(
            Found(
                name=name,
                rate=own[0]["rate"],
                scores={seed: mean([x for x in own if x["seed"] == seed]) for seed in seeds},
                by_task={
                    task: mean([x for x in own if task_of(x["client"]) == task]) for task in tasks
                },
                numbers_up=float(np.mean([x["numbers_up"] / x["round"] for x in own])),
                seconds=float(np.median([x["seconds"] for x in own])),
            )
        )
    return found


def task_of(client: str) -> str:
    """Return the task of a client such as "minilm6-trec/0"."""
    return client.split("/")[0].split("-")[1]


def gap(one: Found, other: Found) -> Interval | None:
    """Return the paired difference over the seeds that both have."""
    seeds = [seed for seed in one.scores if seed in other.scores]
    if one.name == other.name or not seeds:
        return None
    return paired_interval([one.scores[seed] - other.scores[seed] for seed in seeds])


def interval_text(value: Interval | None) -> str:
    """Write a difference in percentage points with its interval."""
    if value is None:
        return ""
    text = difference_of(METRIC, value.mean)
    if value.low is None or value.high is None:
        return text
    return f"{text} ({difference_of(METRIC, value.low)} to {difference_of(METRIC, value.high)})"


def table(setting: plan.Setting, found: Sequence[Found]) -> list[str]:
    """Write a setting's table, the best first."""
    floor = next((row for row in found if row.name == plan.FLOOR), None)
    tasks = list(dict.fromkeys(task for row in found for task in row.by_task))
    heads = ["row", "rate", "accuracy", f"minus {plan.FLOOR}", *tasks, "numbers up", "s a run"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in sorted(found, key=lambda row: -np.mean(list(row.scores.values()))):
        values = list(row.scores.values())
        cells = [
            f"`{row.name}`", f"{row.rate:g}", share(float(np.mean(values))),
            interval_text(None if floor is None else gap(row, floor)),
            *(share(row.by_task.get(task)) for task in tasks),
            f"{row.numbers_up:,.0f}", f"{row.seconds:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    counts = {len(row.scores) for row in found}
    missing = [name for name in setting.rows if name not in {row.name for row in found}]
    notes = f"Seeds a row: {', '.join(map(str, sorted(counts)))}."
    if missing:
        notes += f" Not run yet: {', '.join(missing)}."
    return [*lines, "", notes]


def draw(setting: plan.Setting, found: Sequence[Found], path: Path) -> None:
    """Draw every row's difference to the floor with its interval."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    floor = next((row for row in found if row.name == plan.FLOOR), None)
    gaps = [] if floor is None else [(row.name, gap(row, floor)) for row in found]
    shown = sorted(
        ((name, value) for name, value in gaps if value is not None), key=lambda x: x[1].mean
    )
    if not shown:
        return
    figure = Figure(figsize=(6.4, 0.9 + 0.28 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, (_, value) in enumerate(shown):
        low = value.mean if value.low is None else value.low
        high = value.mean if value.high is None else value.high
        axes.plot([100 * low, 100 * high], [place, place], color="C0", lw=1.5)
        axes.plot(100 * value.mean, place, "o", color="C0", ms=4)
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_xlabel(f"test accuracy minus {plan.FLOOR}, percentage points, 95 % interval")
    axes.set_title(setting.title, fontsize=10)
    with pyplot.rc_context({"svg.hashsalt": "real_3x3"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parts = []
    for setting in plan.SETTINGS.values():
        found = found_of(setting, bench.read(bench.RESULTS / f"{setting.name}.csv"))
        parts += [f"### {setting.title}", "", setting.about, ""]
        if not found:
            parts += ["Not run yet.", ""]
            continue
        draw(setting, found, bench.RESULTS / f"{setting.name}.svg")
        parts += [*table(setting, found), "", f"![{setting.name}](results/{setting.name}.svg)", ""]
    page = FOLDER / "README.md"
    before, rest = page.read_text().split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n\n" + "\n".join(parts) + f"{END}{after}")


if __name__ == "__main__":
    main()

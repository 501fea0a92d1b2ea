"""Make the tables and plots of this folder from the rows in results/; no number is typed by hand.

    python experiments/real_3x3/report.py

Writes results/*.svg and the part of README.md between its markers. Needs the extra `plot`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import plan
from plan_types import LADDER, Setting, own_rows
from record import at_others_rate, costs_of, measured, path_of, progress, read
from report_pictures import draw, draw_curve
from report_rows import METRIC, MOMENTS, Beside, Found, found_of

from h2tune_jax.run.numbers import difference_of, duration, share, size
from h2tune_jax.run.paired import Interval

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
BYTES = 4  # of a number: all that travels is, but for the masks of the examples that `centralised` sends
START, END = "<!-- results -->", "<!-- end of results -->"


def interval_text(value: Interval | None) -> str:
    """Write a difference in percentage points with its interval."""
    if value is None:
        return ""
    text = difference_of(METRIC, value.mean)
    if value.low is None or value.high is None:
        return text
    return f"{text} ({difference_of(METRIC, value.low)} to {difference_of(METRIC, value.high)})"


def beside_text(value: Beside | None) -> str:
    """Write an accuracy at another moment, and its difference to what it is compared with."""
    if value is None:
        return ""
    return share(value.mean) + ("" if value.over is None else f": {interval_text(value.over)}")


def rows_of(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Write a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *body)]


def table(setting: Setting, found: Sequence[Found]) -> list[str]:
    """Write a setting's tables: how good the rows are, the best first, and folded away what they cost."""
    rival = found[0].rival
    tasks = list(dict.fromkeys(task for row in found for task in row.by_task))
    beside = [] if rival is None else [f"minus `{rival}`"]
    moments = [name for name in MOMENTS if any(name in row.beside for row in found)]
    tuned = [f"minus `{plan.TUNED_FLOOR}`"] if plan.TUNED_FLOOR in setting.rows else []
    heads = ["row", "rate", "seeds", METRIC, f"minus `{plan.FLOOR}`", *tuned, *beside, *tasks]
    heads += [MOMENTS[name] for name in moments]
    body = [
        [
            f"`{row.name}`", rate_text(setting, row), f"{len(row.scores)}", share(row.mean),
            interval_text(row.over_floor),
            *([interval_text(row.over_tuned)] if tuned else []),
            *([] if rival is None else [interval_text(row.over_rival)]),
            *(share(row.by_task.get(task)) for task in tasks),
            *(beside_text(row.beside.get(name)) for name in moments),
        ]
        for row in ranked(setting, found)
    ]  # fmt: skip
    lines = [*rows_of(heads, body), "", notes(setting, found), *sharing(found), ""]
    if len(tasks) > 1:
        lines += [*folded("By task", task_table(setting, found, tasks)), ""]
    return [
        *lines,
        *folded("By client", client_table(setting, found)),
        "",
        *folded("What it costs", cost_of_rows(setting, found)),
    ]


def ranked(setting: Setting, found: Sequence[Found]) -> list[Found]:
    """Order rows by accuracy; those that have not run with all seeds come last."""
    return sorted(found, key=lambda row: (len(row.scores) < len(setting.seeds), -row.mean))


def rate_text(setting: Setting, row: Found) -> str:
    """Write the rates that were chosen, with a mark at the least and the largest that there is."""
    tried = (*setting.rows[row.name].rates, *LADDER)
    mark = lambda rate: "\\*" if rate in (min(tried), max(tried)) else ""
    return ", ".join(f"{rate:g}{mark(rate)}" for rate in row.rates)


def folded(title: str, lines: Sequence[str]) -> list[str]:
    """Fold lines away under a title."""
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def task_table(setting: Setting, found: Sequence[Found], tasks: Sequence[str]) -> list[str]:
    """Write every task's difference to the floor, and what sharing adds to it."""
    shared = any(row.alone_by_task for row in found)
    heads = ["row", *(f"{task}, minus `{plan.FLOOR}`" for task in tasks)]
    heads += [f"{task}, sharing" for task in tasks] if shared else []
    body = []
    for row in ranked(setting, found):
        cells = [interval_text(row.over_floor_by_task.get(task)) for task in tasks]
        cells += [interval_text(row.alone_by_task.get(task)) for task in tasks] if shared else []
        body.append([f"`{row.name}`", *cells])
    return rows_of(heads, body)


def client_table(setting: Setting, found: Sequence[Found]) -> list[str]:
    """Write every client's accuracy in percent, with its 95 % interval over seeds."""
    clients = list(dict.fromkeys(client for row in found for client in row.by_client))
    body = [
        [f"`{row.name}`", *(mean_text(row.by_client.get(client)) for client in clients)]
        for row in ranked(setting, found)
    ]
    return rows_of(["row", *clients], body)


def mean_text(value: Interval | None) -> str:
    """Write a mean over seeds, and half of its interval's width."""
    if value is None:
        return ""
    reach = "" if value.high is None else f" ± {100 * (value.high - value.mean):.1f}"
    return f"{100 * value.mean:.1f}{reach}"


def cost_of_rows(setting: Setting, found: Sequence[Found]) -> list[str]:
    """Write what every row sends, trains and takes; what was counted of none has no column."""
    heads = ["row", "sent up", "sent down", "numbers trained", "memory of a round", "s a round"]
    body = [
        [
            f"`{row.name}`", *(size(BYTES * count) for count in row.numbers),
            "" if row.trained is None else f"{row.trained:,.0f}",
            "" if row.planned_bytes is None else size(row.planned_bytes),
            f"{row.seconds / setting.rounds:.1f}",
        ]
        for row in ranked(setting, found)
    ]  # fmt: skip
    filled = [i for i in range(len(heads)) if any(line[i] for line in body)]
    heads, *body = ([line[i] for i in filled] for line in [heads, *body])
    return rows_of(heads, body)


def sharing(found: Sequence[Found]) -> list[str]:
    """Say what sharing itself adds: a row minus the same row where nothing is shared."""
    said = []
    for row in found:
        here, own = interval_text(row.over_alone_here), interval_text(row.over_alone)
        there = interval_text(row.over_alone_there)
        if here and own:
            text = f"{own} in `{row.name}`"
            if here != own:
                text += (
                    f" with each at its own best rate, {here} at the rate of the form that shares"
                )
                text += f", {there} at the rate of the form alone" if there else ""
            said.append(text)
    return ["", f"What sharing itself adds, paired by seed: {'; '.join(said)}."] if said else []


def ablation_table(setting: Setting, found: Sequence[Found]) -> list[str]:
    """Write an ablation's table in the order of the plan, each row with what was changed."""
    heads = ["what is changed", "row", "rate", METRIC]
    heads += [f"minus `{setting.against}`", f"minus `{plan.FLOOR}`", MOMENTS["without"]]
    body = [
        [
            setting.rows[row.name].words, f"`{row.name}`", rate_text(setting, row), share(row.mean),
            interval_text(row.over_rival), interval_text(row.over_floor),
            beside_text(row.beside.get("without")),
        ]
        for row in found
    ]  # fmt: skip
    form = ", ".join(f"{name} {value}" for name, value in plan.COMMON_BASIS.items())
    about = f"`{plan.BEST}` is the row `h2tune` but for: {form} (before the rates are chosen)."
    return [*rows_of(heads, body), "", f"{about} {notes(setting, found)}", *sharing(found)]


def notes(setting: Setting, found: Sequence[Found]) -> str:
    """Say what a table is made of, and what is missing in it."""
    counts = sorted({len(row.scores) for row in found})
    text = f"Seeds a row: {', '.join(map(str, counts))}."
    if any("*" in rate_text(setting, row) for row in found):
        text += " \\* the least or the largest rate that is tried."
    names = {row.name for row in found}
    missing = [name for name in setting.rows if name not in names]
    if missing:
        text += f" Not run yet: {', '.join(missing)}."
    if setting.against is None:
        said = [f"`{row.name}`: {setting.rows[row.name].words}" for row in found]
        said = [words for words in said if not words.endswith(": ")]
        text += f" What the names do not say: {'; '.join(said)}." if said else ""
    return text


def curve_table(curve: str, points: Mapping[int, Sequence[Found]]) -> list[str]:
    """Write a curve: a line for every value, its rows' accuracies and differences to the floor."""
    names = list(dict.fromkeys(row.name for found in points.values() for row in found))
    heads = [curve]
    for name in names:
        heads += [f"`{name}`"] if name == plan.FLOOR else [f"`{name}`", f"minus `{plan.FLOOR}`"]
    heads.append(f"sharing in `{plan.BEST}`")
    body = []
    for value, found in points.items():
        rows = {row.name: row for row in found}
        cells = [str(value)]
        for name in names:
            row = rows.get(name)
            cells.append("" if row is None else share(row.mean))
            if name != plan.FLOOR:
                cells.append("" if row is None else interval_text(row.over_floor))
        best = rows.get(plan.BEST)
        body.append([*cells, "" if best is None else interval_text(best.over_alone)])
    return rows_of(heads, body)


def cost_table(settings: Mapping[str, Setting], folder: Path) -> list[str]:
    """Write what every setting's runs took, from their lines, and on what."""
    body, machines, total = [], set(), 0.0
    for name, setting in settings.items():
        own = own_rows(setting, settings)
        if not own:
            continue
        lines = read(path_of(name, folder))
        far = progress(setting, own, folder)
        machines |= {f"{x['device']}, {x['cores']} cores, JAX {x['jax']}" for x in lines}
        total += far.seconds
        body.append([f"`{name}`", f"{far.finished} of {far.total}", duration(far.seconds)])
    lines = rows_of(["setting", "runs", "training and measuring, compiling included"], body)
    if machines:
        where = "; ".join(sorted(machines))
        lines += ["", f"In all {duration(total)}, on {where}. Runs side by side are added up."]
    return lines


def page_of(settings: Mapping[str, Setting], folder: Path) -> str:
    """Write all sections from the rows in a folder, and draw their pictures there."""
    parts: list[str] = []
    curves: dict[str, dict[int, list[Found]]] = {}
    for name, setting in settings.items():
        lines = measured(setting, settings, folder)
        elsewhere = at_others_rate(setting, settings, folder)
        found = found_of(setting, lines, costs_of(setting, folder), elsewhere)
        if setting.point is not None:
            if found:
                curves.setdefault(setting.point.curve, {})[setting.point.value] = found
            continue
        parts += [f"### {setting.title}", "", f"{setting.about} (`{name}`)", ""]
        if not found:
            parts += ["Not run yet.", ""]
            continue
        body = table if setting.against is None else ablation_table
        parts += [*body(setting, found), ""]
        if draw(setting, found, folder / f"{name}.svg"):
            parts += [f"![{setting.title}](results/{name}.svg)", ""]
    parts += ["### By rank, by number of examples, and by number of rounds", "", CURVES_ABOUT, ""]
    for curve, points in curves.items():
        draw_curve(curve, points, folder / f"curve-{curve}.svg")
        parts += [*curve_table(curve, points), "", f"![{curve}](results/curve-{curve}.svg)", ""]
    if not curves:
        parts += ["Not run yet.", ""]
    parts += ["### What it cost", "", *cost_table(settings, folder), ""]
    return "\n".join(parts)


CURVES_ABOUT = (
    "The federation of `both` with another rank, another number of examples a client, or more or fewer "
    "rounds; as many steps a round everywhere, and the rates that the rows chose in `both`."
)


def main() -> None:
    page = FOLDER / "README.md"
    before, rest = page.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    text = f"{before}{START}\n\n{page_of(plan.SETTINGS, RESULTS)}\n{END}{after}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

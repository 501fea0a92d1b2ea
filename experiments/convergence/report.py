"""Make the plots and the tables of this folder from the rows in results/.

    python experiments/convergence/report.py

Writes results/*.svg, results/fedavg-theory.csv, and the part of README.md between its markers. Needs the
extra `plot`. Settings without rows are said not to have been run.
"""

import sys
from pathlib import Path

import numpy as np

from h2tune_jax.study import rows
from h2tune_jax.study.convergence import (
    measured,
    rounds_path,
    rows_path,
    verdicts_of,
)
from h2tune_jax.study.plot import Curve, Panel, draw_rates
from h2tune_jax.study.problems.quadratic import constant_step_floor, expected_run
from h2tune_jax.study.rate import judge
from h2tune_jax.study.settings import SETTINGS, build_problem, step_rule

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
START, END = "<!-- results -->", "<!-- end of results -->"
TITLES = {
    "h2tune": "H2Tune: the theorem's setting on three problems",
    "fedavg": "FedAvg on the strongly convex quadratic",
    "wrong": "Step sizes that are wrong",
    "beyond": "Where the horizons may end too soon",
    "participation": "Sweep: participation",
    "local_steps": "Sweep: local steps",
    "heterogeneity": "Sweep: heterogeneity",
    "alternation": "Sweep: alternation",
    "upload": "Sweep: upload",
    "noise": "Sweep: clipped and noisy uploads",
}


def rows_of(setting):
    """A setting's rows, or None where there are none."""
    path = rows_path(RESULTS, setting)
    return rows.read_rows(path) if path.exists() and rows.read_finished(path) else None


def curves_of(setting, table, label):
    # Where a client's result was refused the run is no run of the method any more.
    values = np.where(table["rejected"] > 0, np.nan, measured(setting, table))
    return [
        Curve(label(constant), *rows.by_seed(table, constant, values))
        for constant in np.unique(table["constant"])
    ]


def verdict_table(group):
    lines = [
        "| setting | what | T | seeds | c | slope | growth | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting in group:
        table = rows_of(setting)
        if table is None:
            lines.append(f"| `{setting.name}` | {setting.about} | | | | | | **not run** |")
            continue
        done = np.unique(table["horizon"]).astype(int)
        missing = set(setting.horizons) - set(done.tolist())
        span = f"{done[0]} - {done[-1]}" + (", **more to run**" if missing else "")
        seeds = len(np.unique(table["seed"]))
        head = f"| `{setting.name}` | {setting.about} | {span} | {seeds} |"
        if setting.exponent is None:
            constants = ", ".join(f"{c:g}" for c in setting.constants)
            lines.append(f"{head} {constants} | | | no claim |")
            continue
        for constant, verdict in verdicts_of(setting, rows_path(RESULTS, setting)).items():
            if np.isfinite(verdict.slope.value):
                measured_as = f"{verdict.slope} | {verdict.growth}"
            else:
                measured_as = "- | -"
            found = "consistent" if verdict.consistent else "**inconsistent**"
            claim = f"{found} with O(T^-{setting.exponent:g})"
            if not verdict.consistent and not np.isfinite(verdict.slope.value):
                claim += f": {verdict.reason}"
            lines.append(f"{head} {constant:g} | {measured_as} | {claim} |")
    return lines


def cost_lines(group):
    total = 0.0
    notes = []
    for setting in group:
        path = rows_path(RESULTS, setting)
        if path.exists():
            notes += rows.read_notes(path)
    for note in notes:
        total += float(note.split(": ")[1].split(" s")[0])
    machines = sorted({note.split(" s, ", 1)[1] for note in notes})
    # Wall time, whatever else the machine did meanwhile.
    return [
        f"{total / 60:.1f} minutes of wall time, compilation included, on {'; '.join(machines)}."
    ]


def theory_rows():
    """FedAvg's measured gap beside its exact expectation."""
    found = []
    for setting in SETTINGS.values():
        table = rows_of(setting) if setting.method == "fedavg" else None
        if table is None or setting.group != "fedavg":
            continue
        known, rule = build_problem(setting).solution, step_rule(setting)
        gap = table["last_loss"] - known.minimum
        for constant in setting.constants:
            horizons, values = rows.by_seed(table, constant, gap)
            _, grads = rows.by_seed(table, constant, table["shared"])
            for horizon, own, grad in zip(horizons, values, grads):
                rates = [rule.rate(constant, t, horizon) for t in range(horizon)]
                exact = expected_run(known, np.array(rates))
                floor = constant_step_floor(known, constant) if setting.step == "constant" else None
                for what, sample, value in (
                    ("last gap", own, exact.gap[-1]),
                    ("mean squared gradient", grad, exact.grad[:-1].mean()),
                ):
                    error = sample.std(ddof=1) / len(sample) ** 0.5
                    # float32 losses round at 1e-7 of F, squared gradients at 1e-6 of themselves.
                    rounding = 5e-7 * max(known.minimum, value) + 1e-5 * value
                    agrees = abs(sample.mean() - value) <= 4 * error + rounding
                    bound = "" if floor is None else f"{floor.drift + floor.noise:.6g}"
                    found.append(
                        (setting.name, constant, horizon, what, sample.mean(), error, value, bound, agrees)
                    )  # fmt: skip
    return found


def theory_section():
    found = theory_rows()
    if not found:
        return []
    header = "setting,constant,horizon,what,measured,standard_error,exact,floor,agrees"
    body = [
        f"{name},{c:g},{horizon},{what},{mean:.6g},{error:.3g},{value:.6g},{floor},{int(agrees)}"
        for name, c, horizon, what, mean, error, value, floor, agrees in found
    ]
    (RESULTS / "fedavg-theory.csv").write_text("\n".join([header, *body]) + "\n")
    agreeing = sum(row[-1] for row in found)
    lines = [
        f"Measured means beside the exact expectations (`expected_run`): {agreeing} of {len(found)} agree "
        "within 4 standard errors (and rounding). All: [fedavg-theory.csv](results/fedavg-theory.csv);"
        " here each setting's longest horizon.",
        "",
        "| setting | c | T | measured F - min F | standard error | exact | closed-form floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS.values():
        own = [row for row in found if row[0] == setting.name and row[3] == "last gap"]
        longest = max((row[2] for row in own), default=0)
        lines += [
            f"| `{name}` | {c:g} | {horizon} | {mean:.4g} | {error:.2g} | {value:.4g} | "
            f"{'' if not floor else f'{float(floor):.4g}'} |"
            for name, c, horizon, _, mean, error, value, floor, _ in own
            if horizon == longest
        ]
    return lines


def parts_section(group):
    """Look at the two terms of the sum apart: a verdict on the sum may rest on one of them."""
    lines = [
        "The two terms of that sum, each with a slope of its own over the last four horizons:",
        "",
        "| setting | c | slope, shared | slope, personal | shared, of the sum at the longest T |",
        "|---|---|---|---|---|",
    ]
    for setting in group:
        table = rows_of(setting)
        if table is None:
            continue
        for constant in setting.constants:
            cells, longest = [], {}
            for part in ("shared", "personal"):
                horizons, values = rows.by_seed(table, constant, table[part])
                cells.append(str(judge(horizons, values).slope))
                longest[part] = values[-1].mean()
            of_sum = longest["shared"] / sum(longest.values())
            lines.append(
                f"| `{setting.name}` | {constant:g} | {' | '.join(cells)} | {100 * of_sum:.2g} % |"
            )
    return lines


def course_of_scale(group):
    """|G| over the rounds of the longest horizon, as a panel."""
    curves = []
    for setting in group:
        path = rounds_path(rows_path(RESULTS, setting))
        if path.exists():
            table = rows.read_rounds(path)
            later = table["last_round"] > 0  # G starts at zero
            size = np.sqrt(table["scale"][later])
            curves.append(Curve(setting.about, table["last_round"][later], size[:, None]))
    return Panel("|G| over the rounds of the longest T", curves, guides=False)


def scale_section(group):
    """|G| over the rounds of the longest horizon."""
    lines = ["|G| in the longest horizon, means over rounds and seeds:", ""]
    tables = {}
    for setting in group:
        path = rounds_path(rows_path(RESULTS, setting))
        if path.exists():
            tables[setting.about] = rows.read_rounds(path)
    if not tables:
        return []
    last = next(iter(tables.values()))["last_round"].astype(int)
    lines.append("| rounds to | " + " | ".join(map(str, last)) + " |")
    lines.append("|---" * (len(last) + 1) + "|")
    for about, table in tables.items():
        cells = " | ".join(f"{value:.3g}" for value in np.sqrt(table["scale"]))
        lines.append(f"| {about} | {cells} |")
    return lines


def draw(name, group):
    """One plot a group: a panel a setting for the main ones, one panel for a sweep."""
    have = [(setting, table) for setting in group if (table := rows_of(setting)) is not None]
    if not have:
        return []
    if name in ("h2tune", "fedavg", "beyond"):
        panels = [
            Panel(
                setting.name,
                curves_of(setting, table, lambda c: f"c = {c:g}"),
                setting.about if "cut" in setting.about else "",
            )
            for setting, table in have
        ]
    else:
        panels = []
        for method in dict.fromkeys(setting.method for setting, _ in have):
            curves = []
            for setting, table in have:
                if setting.method == method:
                    label = lambda c, s=setting: (
                        f"{s.about.removeprefix(f'{s.method}, ')}, c = {c:g}"
                    )
                    curves += curves_of(setting, table, label)
            panels.append(Panel(f"{method}, {name.replace('_', ' ')}", curves))
    if name == "upload":
        panels.append(course_of_scale(group))
    y = "F - min F, or squared gradients" if name == "fedavg" else "mean squared gradients"
    draw_rates(RESULTS / f"{name}.svg", panels, x="rounds T", y=y)
    return [f"![{TITLES[name]}](results/{name}.svg)", ""]


def main():
    sections = []
    for name, title in TITLES.items():
        group = [setting for setting in SETTINGS.values() if setting.group == name]
        sections += [f"### {title}", "", *draw(name, group), *verdict_table(group), ""]
        if name == "fedavg":
            sections += [*theory_section(), ""]
        if name in ("h2tune", "beyond"):
            sections += [*parts_section(group), ""]
        if name == "upload":
            sections += [*scale_section(group), ""]
        if any(rows_path(RESULTS, setting).exists() for setting in group):
            sections += [*cost_lines(group), ""]
    path = FOLDER / "README.md"
    before, _, rest = path.read_text().partition(START)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{START}\n\n" + "\n".join(sections).rstrip() + f"\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

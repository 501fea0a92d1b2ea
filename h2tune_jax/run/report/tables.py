"""The report's tables: what each group, each method and each client ended with."""

from collections.abc import Sequence

import numpy as np

from h2tune_jax.run import numbers
from h2tune_jax.run.paired import compare_scores
from h2tune_jax.run.report.html import figure, grid, join, note, table
from h2tune_jax.run.report.page import Section
from h2tune_jax.run.report.svg import Bar, interval_chart
from h2tune_jax.run.report.teams import groups_of, last_values, nan_mean, teams_of
from h2tune_jax.run.report.view import (
    MOMENT_TITLES,
    RunView,
    final_score,
    main_moment,
    moments_of,
)

MOST_ROWS = 60
_QUANTILES = (0, 10, 50, 90, 100)


def summary(views: Sequence[RunView]) -> Section:
    """Build the first table: every group at its last evaluation."""
    groups, teams = groups_of(views), teams_of(views)
    # On a narrow screen the last columns have to be scrolled to: what was reached comes first.
    header = ["group", *(team.name for team in teams), "majority class", "task", "clients", "rank"]
    moment = main_moment(views[0])
    rows = []
    for group in groups[:MOST_ROWS]:
        row: list[object] = [group.name]
        for team in teams:
            metric, values = last_values(team, group, moment)
            if metric is None:
                row.append(numbers.MISSING)
                continue
            text = numbers.value_of(metric, float(nan_mean(values)))
            row.append(text if metric == "accuracy" else f"{text} ({metric})")
        facts = numbers.share(group.majority), group.task, f"{len(group.clients):,}", group.rank
        rows.append([*row, *facts])
    several = " and over seeds" if any(len(team.runs) > 1 for team in teams) else ""
    when = MOMENT_TITLES.get(moment, moment)
    caption = f"At the last evaluation, {when}: mean over each group's clients{several}."
    body = [table(header, rows, caption=caption)]
    if len(rows) < len(groups):
        body.append(note(f"The first {MOST_ROWS} of {len(groups)} groups."))
    if all(group.majority is None for group in groups):
        body.append(note("The share of the most frequent class is not known for this run."))
    done = {view.label: _rounds_done(view) for view in views}
    if len(set(done.values())) == 1:
        body.append(note(f"Rounds done: {done[views[0].label]}."))
    else:
        listed = "; ".join(f"{label}: {text}" for label, text in done.items())
        body.append(note(f"Rounds done: {listed}."))
    body += [note(f"{view.label}: {view.damage}.") for view in views if view.damage]
    return Section("summary", "Summary", join(body))


def comparison(views: Sequence[RunView], baseline: str | None) -> Section | None:
    """Compare what is drawn in different colours, paired by seed; None where no two share a seed."""
    teams = teams_of(views)
    scores = [
        final_score(view)._replace(method=team.name)
        for team in teams
        for view in team.runs
        if final_score(view).values
    ]
    seeds = [score.seed for score in scores]
    if len(set(seeds)) == len(seeds):
        return None
    wanted = baseline or "local"
    named = (team.name for team in teams if team.runs[0].method == wanted)
    found = compare_scores(scores, next(named, scores[0].method))
    rows, bars = [], []
    shares = all(numbers.is_share(row.metric) for row in found.rows)
    for row in found.rows:
        gap = row.difference
        spread = numbers.spread_of(row.metric, row.spread)
        cells = [row.group, row.method, numbers.value_of(row.metric, row.mean) + spread]
        if gap is None:
            cells += [numbers.MISSING, numbers.MISSING]
        else:
            ends = "one seed" if gap.low is None else " to ".join(
                numbers.difference_of(row.metric, end) for end in (gap.low, gap.high)
            )  # fmt: skip
            cells += [numbers.difference_of(row.metric, gap.mean), ends]
            colour = found.methods.index(row.method)
            if shares:
                label = f"{row.group}: {row.method}"
                bars.append(Bar(label, gap.mean, gap.low, gap.high, colour))
        rows.append([*cells, len(row.seeds)])
    header = ["group", "method", "mean ± sd", f"minus {found.baseline}",
              "95 % interval", "seeds"]  # fmt: skip
    body = [
        note(
            f"Every method against {found.baseline}, paired by seed: the difference of the same seed's "
            "runs, averaged over seeds, with the 95 % interval of the paired t-test. Differences of "
            "shares are in percentage points. One seed gives no interval."
        )
    ]
    if bars:
        chart = interval_chart("Differences with 95 % intervals", bars[:MOST_ROWS], percent=True)
        body.append(grid(figure(chart, f"Difference to {found.baseline}")))
    body.append(table(header, rows[: 4 * MOST_ROWS]))
    return Section("comparison", "Comparison", join(body))


def clients(views: Sequence[RunView]) -> Section | None:
    """Build the table of every client, or its quantiles where there are many."""
    groups, teams = groups_of(views), teams_of(views)
    columns = [(team, m) for team in teams for m in moments_of(views) if m != "newcomers"]
    columns = [
        (team, moment)
        for team, moment in columns
        if any(last_values(team, group, moment)[0] for group in groups)
    ]
    if not columns:
        return None
    names = [
        team.name if moment == "trained" else f"{team.name}, {MOMENT_TITLES.get(moment, moment)}"
        for team, moment in columns
    ]
    total = sum(len(group.clients) for group in groups)
    averaged = any(len(team.runs) > 1 for team in teams)
    said = "Each client's mean over seeds, at the last evaluation." if averaged else None
    if total <= MOST_ROWS:
        rows = []
        for group in groups:
            last = [last_values(team, group, moment) for team, moment in columns]
            for place, name in enumerate(group.clients):
                row: list[object] = [name]
                for metric, values in last:
                    if metric is None or place >= len(values):
                        row.append(numbers.MISSING)
                    else:
                        row.append(numbers.value_of(metric, values[place]))
                rows.append([*row, numbers.share(group.majority), group.task])
        shown = table(["client", *names, "majority class", "task"], rows, caption=said)
        return Section("clients", "Clients", shown)
    rows = []
    for group in groups[:MOST_ROWS]:
        for (team, moment), name in zip(columns, names):
            metric, values = last_values(team, group, moment)
            known = values[np.isfinite(values)]
            if metric is None or not len(known):
                continue
            marks = np.percentile(known, _QUANTILES)
            cells = [numbers.value_of(metric, float(mark)) for mark in marks]
            rows.append([group.name, name, f"{len(known):,}", *cells])
    header = ["group", "run", "clients evaluated", "lowest", "10 %", "median", "90 %", "highest"]
    body = note(f"{total:,} clients, shown by quantiles of what each group's clients reached.")
    return Section("clients", "Clients", join([body, table(header, rows, caption=said)]))


def _rounds_done(view: RunView) -> str:
    done = sum(record.get("round", -1) >= 0 for record in view.records)
    planned = view.config.get("rounds")
    counted = f"{done:,}" if planned is None else f"{done:,} of {planned:,}"
    return f"{counted}, still running" if view.is_live else counted

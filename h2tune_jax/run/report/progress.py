"""How good the clients became over the rounds: curves by group and by task."""

from collections.abc import Sequence

import numpy as np

from h2tune_jax.run import numbers
from h2tune_jax.run.report.html import Html, details, figure, grid, join, note, table, tag
from h2tune_jax.run.report.page import Section
from h2tune_jax.run.report.svg import NUM_COLOURS, Band, Guide, Line, legend, line_chart
from h2tune_jax.run.report.teams import Team, groups_of, mean_over_runs, teams_of
from h2tune_jax.run.report.view import (
    MOMENT_TITLES,
    Curve,
    GroupView,
    RunView,
    curve,
    main_moment,
    metric_of,
    moments_of,
    training_mean,
)

MOST_LINES = 12
MOST_GROUPS = 24


def progress(views: Sequence[RunView]) -> Section:
    """Build the curves over rounds, one chart a group, at each evaluated moment."""
    groups = groups_of(views)
    moments = moments_of(views)
    if not moments:
        return Section("rounds", "Over rounds", note("No round of these runs has been evaluated."))
    body: list[Html] = [legend(_legend(teams_of(views), groups))]
    for moment in moments:
        charts = [_group_chart(views, group, moment) for group in groups[:MOST_GROUPS]]
        charts = [chart for chart in charts if chart is not None]
        if charts:
            body.append(tag("h3", _capital(MOMENT_TITLES.get(moment, moment))))
            body.append(grid(*charts))
    if len(groups) > MOST_GROUPS:
        body.append(note(f"The first {MOST_GROUPS} of {len(groups)} groups are drawn."))
    tasks = _task_charts(views, groups)
    if tasks:
        when = MOMENT_TITLES.get(main_moment(views[0]), main_moment(views[0]))
        body += [tag("h3", f"By task, {when}"), grid(*tasks)]
    losses = [_loss_chart(views, group) for group in groups[:MOST_GROUPS]]
    losses = [chart for chart in losses if chart is not None]
    if losses:
        body += [
            tag("h3", "Training loss"),
            note("Mean over the clients that took part in the round."),
            grid(*losses),
        ]
    body.append(details("Every evaluated round in numbers", _round_table(views, groups, moments)))
    return Section("rounds", "Over rounds", join(body))


def _group_chart(views: Sequence[RunView], group: GroupView, moment: str) -> Html | None:
    metric = next((m for view in views if (m := metric_of(view, group.name))), None)
    if metric is None:
        return None
    teams = teams_of(views)
    lines, bands = [], []
    for name, colour, runs in teams:
        found = [curve(view, group.name, metric, moment) for view in runs]
        found = [one for one in found if len(one.rounds)]
        if not found:
            continue
        if len(found) > 1:
            lines += [
                Line(f"{view.label}: mean of the clients", one.rounds, one.mean, colour, thin=True)
                for view, one in zip(runs, found)
            ][:MOST_LINES]
            rounds, mean = mean_over_runs(found)
            lines.append(Line(f"{name}: mean over seeds", rounds, mean, colour))
            continue
        one = found[0]
        width = one.values.shape[1]
        if 1 < width <= MOST_LINES // len(teams):
            lines += [
                Line(f"{name}: {group.client_name(i)}", one.rounds, values, colour, thin=True)
                for i, values in zip(one.clients, one.values.T)
            ]
        elif width > 1:
            bands.append(_band(name, one, colour))
        lines.append(Line(f"{name}: mean", one.rounds, one.mean, colour))
    if not lines:
        return None
    guides = []
    if metric == "accuracy" and group.majority is not None:
        guides = [Guide("majority class", group.majority)]
    title = f"{metric} of group {group.name}, {MOMENT_TITLES.get(moment, moment)}"
    chart = line_chart(title, lines, bands=bands, guides=guides, percent=numbers.is_share(metric))
    about = tag("small", f" {group.task}, {metric}")
    return figure(chart, join([group.name, about]))


def _band(name: str, one: Curve, colour: int) -> Band:
    # Rounds in which nobody was evaluated have no quantiles.
    low, high = np.full(len(one.rounds), np.nan), np.full(len(one.rounds), np.nan)
    for place, row in enumerate(one.values):
        known = row[np.isfinite(row)]
        if len(known):
            low[place], high[place] = np.percentile(known, (10, 90))
    return Band(f"{name}: 10 % to 90 % of the clients", one.rounds, low, high, colour)


def _task_charts(views: Sequence[RunView], groups: Sequence[GroupView]) -> list[Html]:
    """Draw the tasks that several groups have; for the others the group's chart says it."""
    charts = []
    for task in dict.fromkeys(group.task for group in groups):
        members = [group for group in groups if group.task == task]
        metrics = {metric_of(view, group.name) for view in views for group in members} - {None}
        if len(members) < 2 or len(metrics) != 1:
            continue
        metric = str(metrics.pop())
        lines = []
        for name, colour, runs in teams_of(views):
            means = []
            for view in runs:
                found = [curve(view, group.name, metric, main_moment(view)) for group in members]
                found = [one for one in found if len(one.rounds)]
                if found and all(np.array_equal(one.rounds, found[0].rounds) for one in found):
                    values = np.concatenate([one.values for one in found], axis=1)
                    ids = np.arange(values.shape[1])
                    means.append(Curve(found[0].rounds, values, ids))
            if means:
                rounds, mean = mean_over_runs(means)
                lines.append(Line(f"{name}: mean", rounds, mean, colour))
        if lines:
            title = f"{metric} of task {task}"
            chart = line_chart(title, lines, percent=numbers.is_share(metric))
            held = ", ".join(group.name for group in members[:4])
            more = f" and {len(members) - 4} more" if len(members) > 4 else ""
            charts.append(figure(chart, join([task, tag("small", f" mean over {held}{more}")])))
    return charts[:MOST_GROUPS]


def _loss_chart(views: Sequence[RunView], group: GroupView) -> Html | None:
    lines = []
    for name, colour, runs in teams_of(views):
        found = [training_mean(view, group.name, "loss") for view in runs]
        found = [one for one in found if len(one.rounds)]
        if found:
            rounds, mean = mean_over_runs(found)
            lines.append(Line(f"{name}: mean", rounds, mean, colour))
    if not lines:
        return None
    chart = line_chart(f"training loss of group {group.name}", lines, height=170)
    return figure(chart, group.name)


def _round_table(
    views: Sequence[RunView], groups: Sequence[GroupView], moments: Sequence[str]
) -> Html:
    columns = []
    for group in groups[:MOST_GROUPS]:
        metric = next((m for view in views if (m := metric_of(view, group.name))), None)
        if metric is None:
            continue
        for team in teams_of(views):
            for moment in moments:
                found = [curve(view, group.name, metric, moment) for view in team.runs]
                found = [one for one in found if len(one.rounds)]
                if found:
                    name = f"{group.name}, {team.name}"
                    name += "" if moment == "trained" else f", {moment}"
                    columns.append((name, metric, dict(zip(*mean_over_runs(found)))))
    rounds = sorted({r for _, _, values in columns for r in values})
    rows = [
        [r, *(numbers.value_of(metric, values.get(r)) for _, metric, values in columns)]
        for r in _some(rounds)
    ]
    shown = table(["rounds done", *(name for name, _, _ in columns)], rows)
    if len(rows) == len(rounds):
        return shown
    return join([note(f"{len(rows)} of {len(rounds)} rounds, evenly spaced."), shown])


def _some(items: list, most: int = 100) -> list:
    """Keep evenly spaced items, the last among them."""
    if len(items) <= most:
        return items
    places = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[place] for place in np.unique(places)]


def _legend(teams: Sequence[Team], groups: Sequence[GroupView]) -> list[tuple[str, str]]:
    entries = [
        (
            f"c{team.colour % NUM_COLOURS}",
            f"{team.name}, mean {'over seeds' if len(team.runs) > 1 else 'of the clients'}",
        )
        for team in teams
    ]
    most = MOST_LINES // len(teams)
    widths = {len(group.clients) for group in groups}
    if any(len(team.runs) > 1 for team in teams):
        entries.append(("thin c0", "each seed"))
    if any(len(team.runs) == 1 for team in teams):
        if any(1 < width <= most for width in widths):
            entries.append(("thin c0", "each client"))
        if any(width > most for width in widths):
            entries.append(("band c0", "10 % to 90 % of the clients"))
    if any(group.majority is not None for group in groups):
        entries.append(("guide", "majority class"))
    return entries


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

"""What the report says of each row: its accuracies, and its differences to others, paired by seed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plan
from plan_types import Setting
from record import task_of

from h2tune_jax.run.paired import (
    OVERALL,
    ComparisonRow,
    Interval,
    Score,
    compare_scores,
    paired_interval,
)

METRIC = "accuracy"
MOMENTS = {
    "downloaded": "right after a download, 200 rows",
    "newcomer": "newcomers, 200 rows",
    "without": "without its core",
}
NOT_RIVALS = ("local", "centralised")
"""Methods that are no baseline to be beaten: the floor and the ceiling."""

Lines = Sequence[Mapping[str, Any]]


class Beside(NamedTuple):
    """A row at another moment than the one that counts."""

    mean: float
    over: Interval | None  # paired by seed: the floor at that moment; of "without", the row itself


class Found(NamedTuple):
    """One row of one setting, on test rows; accuracies are means over clients."""

    name: str
    rates: tuple[float, ...]  # one, or by task
    scores: Mapping[int, float]  # by seed
    by_task: Mapping[str, float]  # over its clients and all seeds
    beside: Mapping[str, Beside]  # at the other moments that were measured, by name
    by_client: Mapping[str, Interval]  # over all seeds
    numbers: tuple[float, float]  # up and down, a client and round
    seconds: float  # a run, median over its seeds
    trained: float | None  # numbers, the mean over clients; None: not measured, as the next
    planned_bytes: float | None  # of a round
    over_floor: Interval | None  # paired by seed, as are all that follow
    over_tuned: Interval | None  # over the floor with a rate of its own for every task
    over_floor_by_task: Mapping[str, Interval]
    alone_by_task: Mapping[str, Interval]  # over the same row where nothing is shared
    over_rival: Interval | None
    over_alone: Interval | None  # the same row where nothing is shared, each at its own best rate
    over_alone_here: Interval | None  # the same, at this row's rate
    over_alone_there: Interval | None  # the same, at that row's rate
    rival: str | None

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.scores.values())))


def found_of(
    setting: Setting,
    lines: Lines,
    costs: Mapping[str, Mapping[str, Any]] | None = None,
    elsewhere: Mapping[str, Lines] | None = None,
) -> list[Found]:
    """Collect what was measured of each row, in the setting's order.

    By row, where known: `costs`, and in `elsewhere` the lines at another row's rate.
    """
    tested = [
        line
        for line in lines
        if line["split"] == "test" and line["row"] in setting.rows and line["seed"] in setting.seeds
    ]
    to_floor = compare(tested, plan.FLOOR)
    whole = {
        name: row.mean for name, row in to_floor.items() if len(row.seeds) == len(setting.seeds)
    }
    rival = rival_of(setting, whole)
    to_rival = {} if rival is None else compare(tested, rival)
    return [
        _found(
            name,
            tested,
            beside_of(setting, name, lines),
            elsewhere or {},
            to_floor,
            to_rival,
            (costs or {}).get(name, {}),
            rival,
        )
        for name in setting.rows
        if name in to_floor
    ]


def _found(
    name: str,
    tested: Lines,
    beside: Mapping[str, Beside],
    elsewhere: Mapping[str, Lines],
    to_floor: Mapping[str, ComparisonRow],
    to_rival: Mapping[str, ComparisonRow],
    cost: Mapping[str, Any],
    rival: str | None,
) -> Found:
    rows = lambda wanted: [line for line in tested if line["row"] == wanted]
    own, floor, alone = rows(name), rows(plan.FLOOR), rows(f"{name}{plan.ALONE}")
    tasks = dict.fromkeys(task_of(line["client"]) for line in own)
    clients = dict.fromkeys(line["client"] for line in own)
    a_round = lambda way: float(np.mean([line[way] / line["round"] for line in own]))
    return Found(
        name=name,
        rates=tuple(sorted({line["rate"] for line in own})),
        scores={seed: mean([x for x in own if x["seed"] == seed]) for seed in to_floor[name].seeds},
        beside=beside,
        by_task={task: mean([x for x in own if task_of(x["client"]) == task]) for task in tasks},
        by_client={
            one: paired_interval([x[METRIC] for x in own if x["client"] == one]) for one in clients
        },
        numbers=(a_round("numbers_up"), a_round("numbers_down")),
        seconds=float(np.median([line["seconds"] for line in own])),
        trained=cost.get("trained"),
        planned_bytes=cost.get("planned_bytes"),
        over_floor=to_floor[name].difference,
        over_rival=to_rival[name].difference if name in to_rival else None,
        over_tuned=over(own, rows(plan.TUNED_FLOOR)),
        over_floor_by_task={} if name == plan.FLOOR else over_by_task(own, floor, tasks),
        alone_by_task=over_by_task(own, alone, tasks),
        over_alone=over(own, alone),
        over_alone_here=over(own, elsewhere.get(f"{name}{plan.ALONE}", ())),
        over_alone_there=over(elsewhere.get(name, ()), alone),
        rival=rival,
    )


def over(lines: Lines, others: Lines) -> Interval | None:
    """Compare one row's mean over clients with another's, or with its own at another moment."""
    if not lines or not others:
        return None
    named = [{**x, "row": "this"} for x in lines] + [{**x, "row": "other"} for x in others]
    return compare(named, "other")["this"].difference


def over_by_task(lines: Lines, others: Lines, tasks: Iterable[str]) -> dict[str, Interval]:
    """Compare task by task, where there are several and both rows have been run."""
    of_task = lambda rows, task: [line for line in rows if task_of(line["client"]) == task]
    tasks = tuple(tasks)
    found = {task: over(of_task(lines, task), of_task(others, task)) for task in tasks}
    return {task: gap for task, gap in found.items() if gap is not None and len(tasks) > 1}


def mean(lines: Lines) -> float:
    return float(np.mean([line[METRIC] for line in lines]))


def beside_of(setting: Setting, name: str, lines: Lines) -> dict[str, Beside]:
    """Average what stands beside a row's test, for the moments that have lines."""

    def at(row: str, split: str) -> Lines:
        own = [x for x in lines if (x["row"], x["split"]) == (row, split)]
        return [line for line in own if line["seed"] in setting.seeds]

    found = {}
    for moment in MOMENTS:
        if own := at(name, moment):
            other = at(name, "test") if moment == "without" else at(plan.FLOOR, moment)
            is_floor = name == plan.FLOOR
            found[moment] = Beside(mean(own), None if is_floor else over(own, other))
    return found


def compare(lines: Lines, baseline: str) -> dict[str, ComparisonRow]:
    """Compare every row's mean over clients with a baseline's, paired by seed."""
    values: dict[tuple[str, int], dict[str, tuple[str, float]]] = {}
    for line in lines:
        run = values.setdefault((line["row"], line["seed"]), {})
        run[line["client"]] = METRIC, line[METRIC]
    scores = [Score(row, seed, clients) for (row, seed), clients in values.items()]
    rows = compare_scores(scores, baseline).rows
    groups = {row.group for row in rows}
    whole = OVERALL if OVERALL in groups else next(iter(groups), OVERALL)  # of one client, that one
    return {row.method: row for row in rows if row.group == whole}


def rival_of(setting: Setting, means: Mapping[str, float]) -> str | None:
    """Name whom rows are compared with beside the floor: the best baseline, by its test accuracy.

    `means` has the rows that have run with all seeds: means over other seeds do not compare.
    """
    if setting.against is not None:
        return setting.against
    none = (*NOT_RIVALS, setting.judged)
    rivals = [name for name in means if setting.rows[name].method not in none]
    return max(rivals, key=lambda name: means[name], default=None)

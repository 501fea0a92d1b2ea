"""What the report says of each row: its accuracies, and its differences to others, paired by seed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plan
from plan_types import Setting

from h2tune_jax.run.paired import OVERALL, ComparisonRow, Interval, Score, compare_scores

METRIC = "accuracy"
MOMENTS = {"downloaded": "right after a download, 200 rows", "newcomer": "newcomers, 200 rows"}
NOT_RIVALS = ("local", "centralised")
"""Methods that are no baseline to be beaten: the floor and the ceiling."""

Lines = Sequence[Mapping[str, Any]]


class Found(NamedTuple):
    """One row of one setting, on test rows; accuracies are means over clients."""

    name: str
    rate: float
    scores: Mapping[int, float]  # by seed
    by_task: Mapping[str, float]  # over its clients and all seeds
    beside: Mapping[str, float]  # the same at the other moments that were measured, by name
    by_client: Mapping[str, float]  # over all seeds
    numbers: tuple[float, float]  # up and down, a client and round
    seconds: float  # a run, median over its seeds
    trained: float | None  # numbers, the mean over clients; None: not measured, as the next
    planned_bytes: float | None  # of a round
    over_floor: Interval | None  # paired by seed, as are the next two
    over_rival: Interval | None
    over_alone: Interval | None  # the same row where nothing is shared
    rival: str | None

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.scores.values())))


def found_of(
    setting: Setting, lines: Lines, costs: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Found]:
    """Collect what was measured of each row, in the setting's order; `costs` by row, where known."""
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
    beside: Mapping[str, float],
    to_floor: Mapping[str, ComparisonRow],
    to_rival: Mapping[str, ComparisonRow],
    cost: Mapping[str, Any],
    rival: str | None,
) -> Found:
    own = [line for line in tested if line["row"] == name]
    tasks = dict.fromkeys(task_of(line["client"]) for line in own)
    clients = dict.fromkeys(line["client"] for line in own)
    a_round = lambda way: float(np.mean([line[way] / line["round"] for line in own]))
    return Found(
        name=name,
        rate=own[0]["rate"],
        scores={seed: mean([x for x in own if x["seed"] == seed]) for seed in to_floor[name].seeds},
        beside=beside,
        by_task={task: mean([x for x in own if task_of(x["client"]) == task]) for task in tasks},
        by_client={one: mean([x for x in own if x["client"] == one]) for one in clients},
        numbers=(a_round("numbers_up"), a_round("numbers_down")),
        seconds=float(np.median([line["seconds"] for line in own])),
        trained=cost.get("trained"),
        planned_bytes=cost.get("planned_bytes"),
        over_floor=to_floor[name].difference,
        over_rival=to_rival[name].difference if name in to_rival else None,
        over_alone=_over_alone(name, tested),
        rival=rival,
    )


def _over_alone(name: str, tested: Lines) -> Interval | None:
    alone = f"{name}{plan.ALONE}"
    pair = [line for line in tested if line["row"] in (name, alone)]
    both = {line["row"] for line in pair} == {name, alone}
    return compare(pair, alone)[name].difference if both else None


def mean(lines: Lines) -> float:
    return float(np.mean([line[METRIC] for line in lines]))


def beside_of(setting: Setting, name: str, lines: Lines) -> dict[str, float]:
    """Average what stands beside a row's test, for the moments that have lines."""
    found = {}
    for moment in MOMENTS:
        own = [x for x in lines if (x["row"], x["split"]) == (name, moment)]
        own = [line for line in own if line["seed"] in setting.seeds]
        if own:
            found[moment] = mean(own)
    return found


def compare(lines: Lines, baseline: str) -> dict[str, ComparisonRow]:
    """Compare every row's mean over clients with a baseline's, paired by seed."""
    values: dict[tuple[str, int], dict[str, tuple[str, float]]] = {}
    for line in lines:
        run = values.setdefault((line["row"], line["seed"]), {})
        run[line["client"]] = METRIC, line[METRIC]
    scores = [Score(row, seed, clients) for (row, seed), clients in values.items()]
    rows = compare_scores(scores, baseline).rows
    return {row.method: row for row in rows if row.group == OVERALL}


def rival_of(setting: Setting, means: Mapping[str, float]) -> str | None:
    """Name whom rows are compared with beside the floor: the best baseline, by its test accuracy.

    `means` has the rows that have run with all seeds: means over other seeds do not compare.
    """
    if setting.against is not None:
        return setting.against
    none = (*NOT_RIVALS, setting.judged)
    rivals = [name for name in means if setting.rows[name].method not in none]
    return max(rivals, key=lambda name: means[name], default=None)


def task_of(client: str) -> str:
    """Return the task of a client such as "minilm6-trec/0"."""
    return client.split("/")[0].split("-")[1]

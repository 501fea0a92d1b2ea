"""What a plan is made of: rows (a method and its options) and settings (a federation and its rows)."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

RATES = (3e-4, 1e-3, 3e-3)
"""The grid of learning rates, of all that is adapted but the heads."""
LADDER = (1e-4, *RATES, 1e-2)
"""Where a row's best rate is at the end of its grid, the grid goes on along this."""


class Row(NamedTuple):
    """A method with its options, as in a config's table `method`; "none" stands for None."""

    method: str
    options: Mapping[str, Any]
    words: str = ""  # what it is, for tables
    rates: tuple[float, ...] = RATES
    rate_of: str | None = None  # a row of the shared setting, whose rate it takes
    rate_beside: str | None = None  # the same, a row of the same setting
    also_at: str | None = None  # a row of the same setting, at whose rate it is tested too
    by_task_of: str | None = None  # a row that shares nothing, here with a rate for every task
    rank: int | None = None  # of every client, scaled as its group is; None: what the group says
    probe: Mapping[str, Any] | None = None  # public texts for this row; None: the setting's
    mean_heads: bool = False  # after every round all clients get the mean of their heads


class Point(NamedTuple):
    """A setting's place on a curve."""

    curve: str  # what is varied
    value: int


class Setting(NamedTuple):
    """A federation and what is run on it. Groups are those of a config, named "model-task"."""

    name: str
    title: str
    about: str
    groups: tuple[Mapping[str, Any], ...]
    rows: Mapping[str, Row]
    seeds: tuple[int, ...]
    grid_seeds: tuple[int, ...]
    rounds: int = 12
    moment: str = "trained"  # when accuracy is taken, on validation and on test rows
    newcomers: int = (
        0  # of each group's clients, who train for one round when the others are through
    )
    probe: Mapping[str, Any] | None = None
    server: Mapping[str, Any] | None = None  # a group whose training rows are the server's own set
    judged: str = "h2tune"  # the method that is compared with the best of the others
    against: str | None = None  # the row that all others are compared with: an ablation
    point: Point | None = None
    shares: str | None = None  # a setting of the same federation: rows that it has too are its own
    rates_from: str | None = None  # where rates were chosen; None: here, on the grid


def fingerprint(setting: Setting, row: Row) -> str:
    """Name all that a run's numbers depend on but rate and seed: lines of other plans do not mix."""
    probe = row.probe or setting.probe
    said = (
        row.method, sorted(row.options.items()), row.rank, row.mean_heads, setting.groups,
        setting.rounds, setting.moment, setting.newcomers, probe, setting.server,
    )  # fmt: skip
    return f"{zlib.crc32(repr(said).encode()):08x}"


def own_rows(setting: Setting, settings: Mapping[str, Setting]) -> dict[str, Row]:
    """Return the rows that a setting runs itself; the others are read from the setting it shares."""
    other = {} if setting.shares is None else settings[setting.shares].rows
    return {name: row for name, row in setting.rows.items() if other.get(name) != row}

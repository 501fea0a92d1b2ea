"""Methods compared over seeds, each (method, seed) a complete run in a folder of its own.

OUT/METHOD/SEED/     a run folder
OUT/comparison.csv, OUT/comparison.md, OUT/report.html
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from h2tune_jax.run import loop, numbers
from h2tune_jax.run.catalog import build_method, method_config
from h2tune_jax.run.config import RunConfig, make_config
from h2tune_jax.run.describe import describe
from h2tune_jax.run.disk import RunError, write_whole, writing
from h2tune_jax.run.events import Notice, Observer, tell
from h2tune_jax.run.federation import Federation, build_federation
from h2tune_jax.run.folder import RunFolder, holds_run, read_facts
from h2tune_jax.run.memory import free_memory
from h2tune_jax.run.notices import PassOn
from h2tune_jax.run.paired import Comparison, ComparisonRow, compare_scores
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.report import write_report
from h2tune_jax.run.report.view import final_score, read_view
from h2tune_jax.run.seeds import simulate_seeds, why_apart
from h2tune_jax.run.stopping import is_finished
from h2tune_jax.types import FederationError

__all__ = ["Comparison", "compare", "comparison_csv", "comparison_markdown", "comparison_table"]


def compare(
    config: RunConfig,
    methods: Sequence[str],
    seeds: int | Sequence[int],
    out: str | Path,
    observers: Sequence[Observer] = (),
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    baseline: str | None = None,
    together: bool | None = None,
    stop_request: Callable[[], bool] | None = None,
) -> Comparison:
    """Run every method with every seed, and compare what they end with, paired by seed.

    A finished run is never run twice, an unfinished one is resumed: the same call goes on with what was
    interrupted. Runs of one seed share their data, models and sampling.

    Args:
      config: what all runs have in common. Its own method's options hold for that method; another method
        takes over those of them that it has too (such as `learning_rate`), else its own defaults.
      methods: names of the catalog.
      seeds: the seeds, or how many: from `config.seed` on.
      out: the folder of the comparison.
      observers: are told of every run, one after the other; of seeds that run together, of the first,
        and of the others' notices.
      options: by method, options that hold for it alone: {"local": {"learning_rate": 3e-3}}.
      baseline: whom to compare with; None means `local` if it is among the methods, else the first.
      together: run the seeds of a method as one program: True, all; False, none; None, as many as fit the
        memory by the estimate of `run.describe`. It decides a seed's last bits, so what was begun goes on
        as it was begun.
      stop_request: as in `simulate`. Raises `RunError` once the present run has been saved.

    Returns:
      The comparison, by group and overall, of the last evaluations after local training; it is also
      written to `out`, as a table (CSV and Markdown) and in the report of all runs.
    """
    if not methods:
        raise FederationError("compare: name at least one method")
    if len(set(methods)) < len(methods):
        raise FederationError(f"compare: a method is named twice: {', '.join(methods)}")
    if baseline is not None and baseline not in methods:
        raise FederationError(f"compare: baseline {baseline!r} is not among {', '.join(methods)}")
    unknown = set(options or {}) - set(methods)
    if unknown:
        raise FederationError(f"compare: options for {min(unknown)!r}, which is not compared")
    listed = range(config.seed, config.seed + seeds) if isinstance(seeds, int) else seeds
    if not listed or len(set(listed)) < len(listed):
        raise FederationError(f"compare: expected one seed or more, each once, got {seeds}")
    out = Path(out)
    configs = {
        (method, seed): run_config(config, method, seed, (options or {}).get(method))
        for seed in listed
        for method in methods
    }
    # Before anything is computed: a run of another config cannot be part of it.
    finished = {key: is_finished(_folder(out, *key), own) for key, own in configs.items()}

    federations: dict[int, Federation] = {}
    for method in methods:
        pending = [seed for seed in listed if not finished[method, seed]]
        for seed in listed:
            if finished[method, seed]:
                tell(tuple(observers), Notice(f"{method}, seed {seed}: finished before"))
        begun = {seed: begun_together(_folder(out, method, seed), seed) for seed in pending}
        own = configs[method, listed[0]]
        teams, fresh = going_on(begun)
        size = 1
        if len(fresh) > 1 and together is not False:
            _build(federations, own, fresh[:1])
            size = len(fresh) if together else room_for(own, federations[fresh[0]], len(fresh))
        if size > 1 and not together:
            _build(federations, own, fresh)
            if why_apart([federations[seed] for seed in fresh]) is not None:
                size = 1
        teams += [tuple(fresh[i : i + size]) for i in range(0, len(fresh), size)]
        before = None
        for team in teams:
            _build(federations, own, team)
            places = [_folder(out, method, seed) for seed in team]
            before = _programs(own, team[0], federations[team[0]], before)
            _run(own, team, places, tuple(observers), federations, stop_request, before.programs)

    folders = [_folder(out, method, seed) for method in methods for seed in listed]
    found = compare_scores([final_score(read_view(folder)) for folder in folders], baseline)
    with writing("the comparison", out, again="try again"):
        write_whole(out / "comparison.csv", comparison_csv(found))
        write_whole(out / "comparison.md", comparison_markdown(found))
    write_report(folders, out / "report.html", baseline=baseline)
    return found


def _build(federations: dict[int, Federation], config: RunConfig, seeds: Sequence[int]) -> None:
    """Build the federations of seeds that are not there yet, on one copy of the frozen weights."""
    for seed in seeds:
        if seed not in federations:
            made = build_federation(config.model_copy(update={"seed": seed}))
            # A model does not depend on the seed, and no method changes it.
            shared = next(iter(federations.values()), made).bases
            federations[seed] = made._replace(bases=shared)


class _Seed(NamedTuple):
    """A seed of a method, for which its programs are compiled."""

    programs: Programs
    federation: Federation


def _programs(config: RunConfig, seed: int, federation: Federation, before: _Seed | None) -> _Seed:
    """Set up a seed's programs: those of the seed of this method before it, where they fit."""
    if before is None or before.programs.specs != federation.specs:
        args = build_method(config), federation.specs, federation.bases, federation.probe, config
        return _Seed(Programs(*args).with_seed(seed, federation.probe), federation)
    is_alike = why_apart([before.federation, federation]) is None
    again = before.programs.with_seed(seed, federation.probe, compiled=is_alike)
    return _Seed(again, federation)


def _run(
    config: RunConfig,
    team: Sequence[int],
    places: Sequence[Path],
    observers: tuple[Observer, ...],
    federations: Mapping[int, Federation],
    stop_request: Callable[[], bool] | None,
    programs: Programs,
) -> None:
    """Run one seed, or several together, to the end; `RunError` where that was interrupted."""
    if len(team) == 1:
        results = [
            loop.simulate(
                config.model_copy(update={"seed": team[0]}),
                out=places[0],
                resume=True,
                observers=observers,
                federation=federations[team[0]],
                method=programs.method,
                stop_request=stop_request,
                programs=programs,
            )
        ]
    else:
        name, listed = config.method.name, ", ".join(map(str, team))
        tell(observers, Notice(f"{name}: seeds {listed} run together; seed {team[0]} is shown"))
        results = simulate_seeds(
            config,
            team,
            places,
            resume=True,
            observers=[observers, *((PassOn(f"seed {seed}", observers),) for seed in team[1:])],
            federations=[federations[seed] for seed in team],
            method=programs.method,
            stop_request=stop_request,
            programs=programs,
        )
    if any(result.reason == "interrupted" for result in results):
        seeds = " and ".join(map(str, team))
        raise RunError(
            f"{config.method.name}, seed {seeds} was interrupted; the same command goes on with it"
        )


def going_on(begun: Mapping[int, tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Sort unfinished seeds: -> (the sets that were begun, the seeds that are in none of them).

    `begun` has for each seed the set that its folder names, () where there is none yet. A kill may have
    come before the last of a set had its folder.
    """
    teams = list(dict.fromkeys(team for team in begun.values() if team))
    members = {seed for team in teams for seed in team}
    return teams, [seed for seed in begun if seed not in members]


def begun_together(folder: Path, seed: int) -> tuple[int, ...]:
    """Return the seeds that a run was begun with, itself among them; () where it was not begun."""
    if not holds_run(folder):
        return ()
    return tuple(read_facts(RunFolder(folder)).get("together", [seed]))


def room_for(config: RunConfig, federation: Federation, count: int) -> int:
    """Return how many of `count` runs fit the device's memory together, by half of what is free."""
    if config.store.kind != "device" or config.engine.devices not in (None, 1):
        return 1
    needs = describe(config, federation).memory
    shared = needs["frozen bases"]
    each = sum(needs.values()) - shared
    free = free_memory()
    return 1 if free is None else int(min(max((free / 2 - shared) // max(each, 1), 1), count))


def run_config(
    config: RunConfig, method: str, seed: int, options: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the config of one run of a comparison."""
    own = method_config(config.method, method).model_dump() | dict(options or {})
    return make_config(config.model_dump() | {"method": own, "seed": seed})


def _folder(out: Path, method: str, seed: int) -> Path:
    return out / method / str(seed)


def _cells(found: Comparison, row: ComparisonRow) -> list[str]:
    mean = numbers.value_of(row.metric, row.mean) + numbers.spread_of(row.metric, row.spread)
    gap = row.difference
    if gap is None:
        return [row.group, row.method, row.metric, mean, "", "", str(len(row.seeds))]
    difference = numbers.difference_of(row.metric, gap.mean)
    interval = "one seed"
    if gap.low is not None and gap.high is not None:
        ends = (numbers.difference_of(row.metric, end) for end in (gap.low, gap.high))
        interval = " to ".join(ends)
    return [row.group, row.method, row.metric, mean, difference, interval, str(len(row.seeds))]


def _header(found: Comparison) -> list[str]:
    return ["group", "method", "metric", "mean ± sd", f"minus {found.baseline}", "95 % interval",
            "seeds"]  # fmt: skip


def comparison_table(found: Comparison) -> Table:
    """Draw the comparison for a terminal. Differences of shares are in percentage points."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(_header(found)):
        table.add_column(name, justify="right" if place > 2 else "left")
    group = None
    for row in found.rows:
        if group not in (None, row.group):
            table.add_row()
        group = row.group
        table.add_row(*_cells(found, row))
    return table


def comparison_markdown(found: Comparison) -> str:
    """Write the comparison as a Markdown table."""
    lines = [_header(found), ["---"] * 7, *(_cells(found, row) for row in found.rows)]
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return body + (
        f"\nDifferences to {found.baseline}, paired by seed, with the 95 % interval of the paired t-test; "
        "of shares in percentage points.\n"
    )


def comparison_csv(found: Comparison) -> str:
    """Write the comparison as CSV, with its numbers in full and empty fields where there is none."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["group", "method", "metric", "mean", "sd", "seeds", "baseline", "difference",
                     "low", "high", "pairs"])  # fmt: skip
    for row in found.rows:
        gap = row.difference
        ends = ["", "", "", ""] if gap is None else [gap.mean, gap.low, gap.high, gap.num_seeds]
        seeds = " ".join(map(str, row.seeds))
        writer.writerow([row.group, row.method, row.metric, row.mean, row.spread, seeds,
                         found.baseline, *ends])  # fmt: skip
    return file.getvalue()

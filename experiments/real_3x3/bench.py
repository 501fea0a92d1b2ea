"""Run the bench: every row of `plan.py`, by the rule that stands there.

    python experiments/real_3x3/bench.py                      # all settings, in the plan's order
    python experiments/real_3x3/bench.py both                 # one: rates on validation, then the test
    python experiments/real_3x3/bench.py both --rows local,h2tune
    python experiments/real_3x3/bench.py --list               # what there is, and how far it is
    python experiments/real_3x3/bench.py --smoke --out FOLDER # tiny random models, in seconds

One program a row: rates and seeds are its arguments. Every run appends its lines to
`results/<setting>.csv` when it is through; what stands there is never run again, so the same command goes
on after an interruption. Processes on different settings do not disturb each other.
"""

import argparse
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import plan
from one_run import federation_of, lines_of, method_of, programs_of, specs_of
from plan_types import Row, Setting, own_rows
from record import (
    OtherPlan,
    RateUnknown,
    Run,
    append,
    check_plan,
    chosen_rate,
    done,
    grid_of,
    path_of,
    planned,
    progress,
    read,
)

from h2tune_jax.run.federation import Federation
from h2tune_jax.run.numbers import duration

__all__ = ["bench", "chosen_rate", "grid_of", "main", "plan", "read"]

RESULTS = Path(__file__).parent / "results"


def bench(setting: Setting, chosen: Mapping[str, Row], out: Path) -> None:
    """Run what is missing of some rows of a setting."""
    path = path_of(setting.name, out)
    federations: dict[tuple, Federation] = {}

    def federation(row: Row, seed: int) -> Federation:
        key = seed, str(row.probe)
        if key not in federations:
            bases = next(iter(federations.values())).bases if federations else None
            federations[key] = federation_of(setting, row, seed, bases)
        return federations[key]

    check_plan(setting, chosen, read(path))
    print(describe(setting, chosen, out), flush=True)
    far = progress(setting, chosen, out)
    if far.finished == far.total:
        return
    # A row that is refused is to be known now, not hours later.
    for row in chosen.values():
        method_of(row).check(specs_of(row, federation(row, setting.seeds[0]).specs))
    # At another row's rate when all have their own: two rows may ask for each other's.
    own = [(name, row._replace(also_at=None)) for name, row in chosen.items()]
    others = [(name, row) for name, row in chosen.items() if row.also_at is not None]
    for name, row in [*own, *others]:
        programs = None
        for split in ("validation", "test"):
            while missing := missing_of(setting, name, row, split, out):
                run = missing[0]
                here = federation(row, run.seed)
                programs = programs or programs_of(setting, row, here.specs)
                found = lines_of(setting, programs, here, run)
                append(path, found)
                accuracy = np.mean([x["accuracy"] for x in found if x["split"] == run.split])
                far = progress(setting, chosen, out)
                print(
                    f"[{far.finished}/{far.total}, {duration(far.left)} left] {setting.name} {name} "
                    f"rate {run.rate:g} seed {run.seed} {split}: {100 * accuracy:.1f} in "
                    f"{found[0]['seconds']} s",
                    flush=True,
                )
        if programs is not None:
            # Programs hold memory maps of which a process has a limited number.
            del programs
            jax.clear_caches()
            gc.collect()


def missing_of(setting: Setting, name: str, row: Row, split: str, out: Path) -> list[Run]:
    """Return what is planned and not done."""
    there = done(read(path_of(setting.name, out)))
    return [run for run in planned(setting, name, row, split, out) if run not in there]


def describe(setting: Setting, chosen: Mapping[str, Row], out: Path) -> str:
    """Say how far some rows of a setting are."""
    if not chosen:
        return f"{setting.name}: nothing of its own to run"
    far = progress(setting, chosen, out)
    left = "" if far.left is None else f", about {duration(far.left)} left"
    return (
        f"{setting.name}: {len(chosen)} rows, {far.finished} of {far.total} runs in "
        f"{duration(far.seconds)}{left}"
    )


def list_settings(chosen: Mapping[str, tuple[Setting, Mapping[str, Row]]], out: Path) -> None:
    """Print every setting and its rows; builds every method, so that wrong options show at once."""
    for setting, rows in chosen.values():
        print(describe(setting, rows, out))
        for name, row in rows.items():
            method_of(row)
            print(f"    {name}" + (f": {row.words}" if row.words else ""))


def choose(
    names: Sequence[str], rows: Sequence[str], settings: Mapping[str, Setting]
) -> dict[str, tuple[Setting, dict[str, Row]]]:
    """Pick settings, and of their own rows those that are named; none named means all.

    Raises ValueError for a name that does not exist.
    """
    names = tuple(settings) if not names or "all" in names else tuple(names)
    for name in names:
        if name not in settings:
            raise ValueError(f"no setting is called {name!r}; there are {', '.join(settings)}")
    known = {row for name in names for row in settings[name].rows}
    if unknown := set(rows) - known:
        raise ValueError(f"no row is called {min(unknown)!r}; there are {', '.join(sorted(known))}")
    chosen = {}
    for name in names:
        own = own_rows(settings[name], settings)
        chosen[name] = settings[name], {row: own[row] for row in (rows or own) if row in own}
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "settings", nargs="*", help=f"of {', '.join(plan.SETTINGS)}; or all, as if none is named"
    )
    parser.add_argument("--rows", help="comma-separated; all that apply")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny random models, two rounds")
    parser.add_argument(
        "--list", action="store_true", help="print what there is, and how far it is"
    )
    args = parser.parse_args(argv)
    settings = plan.smoke(args.out) if args.smoke else plan.SETTINGS
    try:
        chosen = choose(args.settings, args.rows.split(",") if args.rows else (), settings)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        list_settings(chosen, args.out)
        return
    for setting, rows in chosen.values():
        try:
            bench(setting, rows, args.out)
        except (OtherPlan, RateUnknown) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()

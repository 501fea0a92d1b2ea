"""Convergence studies: run settings, write their rows, and hold a claimed rate against them.

    python -m h2tune_jax.study.convergence h2tune/sensing fedavg/* --out experiments/convergence/results
    python -m h2tune_jax.study.convergence --problem sensing --method fedit --constants 0.1 0.3 --seeds 8

Exit code 0: all claimed rates are consistent with the data. 1: some are not. 2: the request is wrong.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from h2tune_jax.study import rows
from h2tune_jax.study.rate import Claim, Verdict, check_seeds, judge
from h2tune_jax.study.settings import (
    PROBLEMS,
    SETTINGS,
    SMOKE,
    Setting,
    build_method,
    build_problem,
    step_rule,
)
from h2tune_jax.types import FederationError, near_match

Say = Callable[[str], None]
OWN_ONLY = (
    "problem_option", "method", "option", "name", "step", "participation", "local_steps",
    "heterogeneity", "measure",
)  # fmt: skip
"""Flags of a setting of one's own: a named one has these fixed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies that the arguments ask for; -> the exit code."""
    args = _parser().parse_args(argv)
    say: Say = lambda text: print(text, flush=True)
    try:
        if args.list:
            for setting in SETTINGS.values():
                say(f"{setting.name:28} {setting.about}")
            return 0
        settings = _chosen(args)
        as_expected = True
        for setting in settings:
            path = rows_path(Path(args.out), setting)
            if not args.judge:
                run_setting(setting, path, say)
            verdicts = verdicts_of(setting, path)
            for constant, verdict in verdicts.items():
                say(f"{setting.name}, c = {constant:g}: {describe(setting, verdict)}")
            wanted = args.expect == "consistent"
            as_expected &= all(verdict.consistent == wanted for verdict in verdicts.values())
        return 0 if as_expected else 1
    except FederationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def rows_path(folder: Path, setting: Setting) -> Path:
    """Return where a setting's rows are kept."""
    return folder / f"{setting.name.replace('/', '-')}.csv"


def rounds_path(path: Path) -> Path:
    """Return where the course of a setting's longest horizon is kept."""
    return path.with_name(f"{path.stem}.rounds.csv")


def run_setting(setting: Setting, path: Path, say: Say = lambda text: None) -> None:
    """Run the horizons of a setting that its file does not have yet."""
    from h2tune_jax.study.horizon import make_horizon

    finished = rows.read_finished(path, setting.identity())
    missing = [horizon for horizon in setting.horizons if horizon not in finished]
    if not missing:
        return
    problem = build_problem(setting)
    method, trained_fn, hyper_fn = build_method(setting)
    run = make_horizon(
        method,
        problem,
        step=step_rule(setting),
        participation=setting.participation,
        trained_fn=trained_fn,
        hyper_fn=hyper_fn,
    )
    constants = np.repeat(np.asarray(setting.constants), setting.seeds)
    seeds = np.tile(np.arange(setting.seeds), len(setting.constants))
    for horizon in missing:
        began = time.perf_counter()
        outcome = run(horizon, constants, seeds)
        outcome = type(outcome)(*(_host(part) for part in outcome))
        note = f"{time.perf_counter() - began:.1f} s, {_machine()}"
        written = constants.tolist(), seeds.tolist(), outcome, note
        if horizon == max(setting.horizons):
            rows.write_rounds(rounds_path(path), horizon, written[0], outcome)
        rows.write_piece(path, setting.identity(), horizon, *written)
        say(f"{setting.name}: T = {horizon}, {len(seeds)} runs, {note}")


def verdicts_of(setting: Setting, path: Path) -> dict[float, Verdict]:
    """Hold a setting's rows against its claim, one verdict a constant; none where nothing is claimed."""
    if setting.exponent is None:
        return {}
    if not path.exists():
        raise FederationError(f"{setting.name}: there are no rows at {path}; run it first")
    table = rows.read_rows(path)
    missing = set(setting.horizons) - set(table["horizon"].astype(int).tolist())
    if missing:
        listed = ", ".join(map(str, sorted(missing)))
        raise FederationError(f"{setting.name}: {path} has no rows of T = {listed}; run it first")
    values = measured(setting, table)
    claim = Claim(exponent=setting.exponent)
    verdicts = {}
    for constant in setting.constants:
        horizons, own = rows.by_seed(table, constant, values)
        _, rejected = rows.by_seed(table, constant, table["rejected"])
        verdicts[constant] = judge(horizons, own, claim, rejected=rejected)
    return verdicts


def measured(setting: Setting, table: rows.Rows) -> np.ndarray:
    """Return what the claim is about, for every row."""
    if setting.measure == "mean":
        return table["shared"] + table["personal"]
    if setting.measure != "gap":
        raise FederationError(
            f"measure {setting.measure!r} is unknown; {near_match(setting.measure, ('mean', 'gap'))}"
        )
    minimum = build_problem(setting).minimum
    if minimum is None:
        raise FederationError(f"{setting.name}: the minimum of {setting.problem} is not known")
    return table["last_loss"] - minimum


def describe(setting: Setting, verdict: Verdict) -> str:
    """Say in one line what was found."""
    claimed = f"O(T^-{setting.exponent:g})"
    if verdict.consistent:
        return f"consistent with {claimed}: slope {verdict.slope}, growth {verdict.growth}"
    return f"NOT consistent with {claimed}: {verdict.reason}"


def _host(part: Any) -> Any:
    if isinstance(part, tuple):
        return type(part)(*(np.asarray(leaf) for leaf in part))  # pyright: ignore
    return np.asarray(part)


def _machine() -> str:
    import jax

    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, {platform.machine()}, jax {jax.__version__}"


def _chosen(args: argparse.Namespace) -> list[Setting]:
    own = {field: value for field in OWN_ONLY if (value := getattr(args, field)) not in (None, [])}
    if args.problem is None and own:
        flags = ", ".join(f"--{field.replace('_', '-')}" for field in own)
        raise FederationError(f"{flags}: of a setting of your own, which needs --problem")
    if args.smoke:
        found = [SMOKE]
    elif args.problem is not None:
        found = [_own_setting(args)]
    else:
        found = []
        for pattern in args.settings:
            names = fnmatch.filter(SETTINGS, pattern)
            if not names:
                raise FederationError(
                    f"no setting is called {pattern!r}; {near_match(pattern, SETTINGS)}"
                )
            found += [SETTINGS[name] for name in names]
        if not found:
            raise FederationError("name a setting (--list shows them), or give --problem")
    changes = {
        field: tuple(value) if isinstance(value, list) else value
        for field in ("horizons", "constants", "seeds")
        if (value := getattr(args, field)) is not None
    }
    if args.rate is not None:
        changes["exponent"] = args.rate
    found = [dataclasses.replace(setting, **changes) for setting in found]
    for setting in found:
        if setting.exponent is not None:
            check_seeds(setting.seeds)
    return found


def _own_setting(args: argparse.Namespace) -> Setting:
    problem_options = _options(args.problem_option)
    if args.local_steps is not None:
        problem_options["local_steps"] = args.local_steps
    if args.heterogeneity is not None:
        problem_options["heterogeneity"] = args.heterogeneity
    method = args.method or "h2tune"
    given = {
        field: value
        for field in ("step", "participation", "measure")
        if (value := getattr(args, field)) is not None
    }
    return Setting(
        name=args.name or f"own/{method}-{args.problem}",
        problem=args.problem,
        problem_options=problem_options,
        method=method,
        options=_options(args.option),
        **given,
    )


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read key=value pairs; values are JSON where they can be, else words."""
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise FederationError(f"option {pair!r}: expected key=value")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="h2tune study convergence",
        description="Run convergence studies and hold a claimed rate against them.",
    )
    add = parser.add_argument
    add("settings", nargs="*", help="names of settings; patterns with * are welcome")
    add("--list", action="store_true", help="show the named settings")
    add("--out", default="runs/convergence", help="folder of the rows (default: %(default)s)")
    add("--judge", action="store_true", help="run nothing; judge the rows that there are")
    add("--smoke", action="store_true", help="a study of seconds, to see that all works")
    add(
        "--expect",
        choices=("consistent", "inconsistent"),
        default="consistent",
        help="what exit code 0 stands for",
    )
    add("--horizons", type=int, nargs="+", help="numbers of rounds T")
    add("--constants", type=float, nargs="+", help="step constants c")
    add("--seeds", type=int, help="how many seeds")
    add("--rate", type=float, help="p of the claimed O(T^-p)")
    own = parser.add_argument_group("a setting of your own")
    add = own.add_argument
    add("--problem", choices=tuple(PROBLEMS), help="what to run on")
    add("--problem-option", action="append", default=[], metavar="KEY=VALUE")
    add("--method", help="name of a method (default: h2tune)")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the method")
    add("--name", help="of the setting")
    add("--step", choices=("sqrt", "constant", "inverse", "decreasing"), help="(default: sqrt)")
    add("--participation", type=float, help="share of the clients in a round (default: 1)")
    add("--local-steps", type=int)
    add("--heterogeneity", type=float)
    add("--measure", choices=("mean", "gap"), help="(default: mean)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Run the bench: every row of `plan.py` in one setting, by the rule that stands there.

    python experiments/real_3x3/bench.py both                 # rates on validation, then the test
    python experiments/real_3x3/bench.py both --rows local,h2tune
    python experiments/real_3x3/bench.py --smoke --out FOLDER # tiny random models, in seconds

One process, one setting, one program a row: rates and seeds are its arguments. Every run appends its lines
to `results/<setting>.csv` when it is through; what stands there is never run again, so the same command
goes on after an interruption.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import plan

import h2tune_jax as h2
from h2tune_jax.bench import rows
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.config import make_config
from h2tune_jax.run.federation import Federation, build_federation
from h2tune_jax.run.settings import MethodConfig

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "setting", "row", "rate", "seed", "split", "round", "client", "examples", "accuracy", "loss",
    "numbers_up", "seconds", "device", "cores", "jax",
)  # fmt: skip
WHOLE = frozenset(("seed", "round", "examples", "numbers_up", "cores"))
NUMBERS = frozenset(("rate", "accuracy", "loss", "seconds"))


class Run(NamedTuple):
    """One training: what a line of the CSV is known by."""

    row: str
    rate: float
    seed: int
    split: str  # which rows it is measured on


class Programs(NamedTuple):
    """One method on one federation's shapes, compiled at most once."""

    method: h2.FederatedMethod
    specs: tuple
    round_fn: Any
    evaluate: Any


def federation_of(setting: plan.Setting, seed: int, bases: tuple | None) -> Federation:
    """Build a setting's federation with the data of a seed; frozen weights are held once."""
    config = make_config({
        "rounds": setting.rounds,
        "seed": seed,
        "method": {"name": "local"},
        "groups": list(setting.groups),
        **({} if setting.probe is None else {"probe": setting.probe}),
    })  # fmt: skip
    made = build_federation(config)
    return made if bases is None else made._replace(bases=bases)


def programs_of(row: plan.Row, specs: tuple) -> Programs:
    """Build a row's programs."""
    method = build_method(MethodConfig(name=row.method, **row.options))
    evaluate = h2.make_evaluate(method, specs, batch_size=plan.TEST_BATCH)
    return Programs(method, specs, h2.make_round(method, specs), evaluate)


def train(
    programs: Programs, federation: Federation, rounds: int, rate: float, seed: int
) -> tuple[Any, dict[str, np.ndarray]]:
    """Train a federation: -> (its state, numbers that each client sent up in all, by cohort)."""
    method, specs = programs.method, programs.specs
    state = h2.init_round(method, specs, federation.bases, federation.probe, jax.random.key(seed))
    hyper = with_rate(method.hyper, rate)
    sent = {spec.name: np.zeros(spec.num_clients) for spec in specs}
    for _ in range(rounds):
        state, metrics = programs.round_fn(
            state, federation.bases, federation.train, None, None, hyper, np.uint32(seed),
            federation.probe,
        )  # fmt: skip
        for name, seen in metrics.clients.items():
            if not np.asarray(seen["finite"]).all():
                print(f"  seed {seed}, rate {rate:g}: {name} was not finite", flush=True)
            sent[name] += np.asarray(seen.get("numbers_up", 0), float)
    return state, sent


def with_rate(hyper: Any, rate: float) -> Any:
    """Set the learning rate; a shared part's own rate keeps its ratio to it, a head's its value."""
    factor = rate / hyper.learning_rate
    scaled = {
        name: value * factor
        for name, value in hyper._asdict().items()
        if name.endswith("rate") and name != "head_rate"
    }
    return hyper._replace(**{name: jnp.asarray(value) for name, value in scaled.items()})


def lines_of(
    setting: plan.Setting, programs: Programs, federation: Federation, run: Run
) -> list[dict[str, Any]]:
    """Do one run: -> its lines, one a client."""
    began = time.perf_counter()
    state, sent = train(programs, federation, setting.rounds, run.rate, run.seed)
    measured = federation.test if run.split == "test" else federation.validation
    found = jax.device_get(programs.evaluate(state, federation.bases, measured))
    seconds = time.perf_counter() - began
    lines = []
    for spec, held in zip(programs.specs, measured):
        counts = np.asarray(held.num_examples)
        for client in range(spec.num_clients):
            lines.append({
                "setting": setting.name, "row": run.row, "rate": run.rate, "seed": run.seed,
                "split": run.split, "round": setting.rounds, "client": f"{spec.name}/{client}",
                "examples": int(counts[client]),
                "accuracy": round(float(found[spec.name]["accuracy"][client]), 6),
                "loss": round(float(found[spec.name]["loss"][client]), 6),
                "numbers_up": int(sent[spec.name][client]), "seconds": round(seconds, 1),
                "device": jax.devices()[0].device_kind,
                "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__,
            })  # fmt: skip
    return lines


def read(path: Path) -> list[dict[str, Any]]:
    """Read a results file: all lines of finished runs."""
    return rows.read(path, whole=WHOLE, numbers=NUMBERS)


def done(lines: Iterable[Mapping[str, Any]]) -> set[Run]:
    """Return the runs whose lines are there."""
    return {Run(line["row"], line["rate"], line["seed"], line["split"]) for line in lines}


def chosen_rate(lines: Iterable[Mapping[str, Any]], row: str, rates: Sequence[float]) -> float:
    """Apply the rule: the best mean accuracy on validation rows; a tie goes to the lower rate."""
    means = {}
    for rate in rates:
        found = [
            line["accuracy"]
            for line in lines
            if (line["row"], line["rate"], line["split"]) == (row, rate, "validation")
        ]
        if found:
            means[rate] = float(np.mean(found))
    return max(sorted(means), key=lambda rate: means[rate])


def bench(setting: plan.Setting, chosen: Mapping[str, plan.Row], out: Path) -> None:
    """Run what is missing of a setting's rows."""
    path = out / f"{setting.name}.csv"
    federations: dict[int, Federation] = {}

    def federation(seed: int) -> Federation:
        if seed not in federations:
            bases = next(iter(federations.values())).bases if federations else None
            federations[seed] = federation_of(setting, seed, bases)
        return federations[seed]

    for name, row in chosen.items():
        programs = None
        for split in ("validation", "test"):
            lines = read(path)
            rates, seeds = row.rates, setting.grid_seeds
            if split == "test":
                rates, seeds = (chosen_rate(lines, name, row.rates),), setting.seeds
            for run in (Run(name, rate, seed, split) for rate in rates for seed in seeds):
                if run in done(lines):
                    continue
                here = federation(run.seed)
                programs = programs or programs_of(row, here.specs)
                found = lines_of(setting, programs, here, run)
                rows.append(path, found, COLUMNS)
                accuracy = np.mean([line["accuracy"] for line in found])
                print(
                    f"{setting.name} {name} rate {run.rate:g} seed {run.seed} {split}: "
                    f"{100 * accuracy:.1f} in {found[0]['seconds']} s",
                    flush=True,
                )
        if programs is not None:
            # Programs hold memory maps of which a process has a limited number.
            del programs
            jax.clear_caches()
            gc.collect()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(plan.SETTINGS)}; all of them")
    parser.add_argument("--rows", help="comma-separated; all that apply")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny random models, two rounds")
    parser.add_argument("--list", action="store_true", help="print what would be run, as JSON")
    args = parser.parse_args(argv)
    settings = plan.smoke(args.out) if args.smoke else plan.SETTINGS
    for name in args.settings or settings:
        if name not in settings:
            parser.error(f"no setting is called {name!r}; there are {', '.join(settings)}")
        setting = settings[name]
        chosen = {key: plan.ROWS[key] for key in setting.rows}
        if args.rows:
            unknown = set(args.rows.split(",")) - set(chosen)
            if unknown:
                parser.error(f"{name} has no row {min(unknown)!r}; it has {', '.join(chosen)}")
            chosen = {key: chosen[key] for key in args.rows.split(",")}
        if args.list:
            print(json.dumps({name: list(chosen)}))
            continue
        bench(setting, chosen, args.out)


if __name__ == "__main__":
    main()

"""The demo: H2Tune against every client alone, on real models and data."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from h2tune_jax.evaluate import make_evaluate
from h2tune_jax.round import init_round
from h2tune_jax.run import checkpoint
from h2tune_jax.run.catalog import build_method, method_config
from h2tune_jax.run.config import RunConfig, parse_config
from h2tune_jax.run.events import Observer
from h2tune_jax.run.federation import Federation, build_federation
from h2tune_jax.run.load_models import ASSETS
from h2tune_jax.run.loop import simulate
from h2tune_jax.run.presets import read_preset
from h2tune_jax.tasks import assets, corpora

METHODS = ("local", "h2tune")


class DemoRow(NamedTuple):
    """One group at the end: mean accuracy over its clients, recomputed from the last checkpoint."""

    group: str
    task: str
    majority: float
    accuracy: dict[str, float]  # by method


class Demo(NamedTuple):
    """What the demo gave."""

    rows: tuple[DemoRow, ...]
    report: Path | None  # None where it was interrupted
    interrupted: bool


def demo_config(overrides: Sequence[str] = ()) -> RunConfig:
    """Return the demo's config."""
    return parse_config(read_preset("demo"), overrides, where="demo.toml", folder=".")


def run_demo(
    config: RunConfig,
    out: Path,
    *,
    observers: Sequence[Observer] = (),
    say: Callable[[str], None] = print,
    stop_request: Callable[[], bool] = lambda: False,
) -> Demo:
    """Run the config with both methods into `out`, one folder each, and report on them.

    What is there already is not run again: a run that was interrupted goes on. Fetches what is missing.
    """
    from h2tune_jax.run.report import write_report

    fetch_assets(config, say)
    federation = build_federation(config)
    folders = []
    for name in METHODS:
        own = config.model_copy(
            update={"name": f"{config.name} {name}", "method": method_config(config.method, name)}
        )
        folders.append(out / name)
        result = simulate(
            own,
            out=folders[-1],
            resume=True,
            observers=observers,
            federation=federation,
            stop_request=stop_request,
        )
        if result.reason == "interrupted":
            return Demo((), None, True)
    tables = {
        name: recompute_accuracy(config, name, federation, folder)
        for name, folder in zip(METHODS, folders)
    }
    rows = tuple(
        DemoRow(
            group=group.name,
            task=group.task,
            majority=group.majority,
            accuracy={name: table[group.name] for name, table in tables.items()},
        )
        for group in federation.groups
    )
    # The method that the demo is about comes first in its report.
    return Demo(rows, write_report(folders[::-1], out / "report.html"), False)


def fetch_assets(config: RunConfig, say: Callable[[str], None]) -> None:
    """Fetch the models and data sets that a config names and that are not here yet."""
    names = [group.model.source for group in config.groups if group.model.source in ASSETS]
    texts = [group.task.data for group in config.groups]
    texts += [] if config.probe is None else [config.probe.data]
    names += [name for name in texts if name in corpora.LABELS]
    for name in dict.fromkeys(names):
        folder = assets.find_root() / name
        if assets.find_damage(folder, assets.ASSETS[name].archive, verify=False) is not None:
            say(f"fetching {name}: {assets.ASSETS[name].about}")
            assets.fetch(name)


def recompute_accuracy(
    config: RunConfig, name: str, federation: Federation, folder: Path
) -> dict[str, float]:
    """Test every client anew as the newest checkpoint holds it: -> mean accuracy by group."""
    method = build_method(method_config(config.method, name))
    key = jax.eval_shape(jax.random.key, 0)
    start = lambda bases, probe, key: init_round(method, federation.specs, bases, probe, key)
    like = jax.eval_shape(start, federation.bases, federation.probe, key)
    state, _, _ = checkpoint.restore_state(folder, like)
    evaluate = make_evaluate(
        method, federation.specs, batch_size=config.evaluation.batch_size,
        client_axis=config.engine.client_axis,
    )  # fmt: skip
    results = evaluate(state, federation.bases, federation.test)
    return {group: float(np.mean(values["accuracy"])) for group, values in results.items()}


def format_demo(rows: Sequence[DemoRow]) -> str:
    """Write the table: accuracy on test rows by group, in percent."""
    header = ["group", "task", "majority", *METHODS, "gain over local"]
    share = lambda value: f"{100 * value:.1f}"
    body = [
        [
            row.group, row.task, share(row.majority),
            *(share(row.accuracy[name]) for name in METHODS),
            f"{100 * (row.accuracy['h2tune'] - row.accuracy['local']):+.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    layout = lambda line: "  ".join(
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(line, widths))
    )
    return "\n".join(map(str.rstrip, map(layout, [header, *body])))

"""The `h2tune` command. Each command calls one function of `h2tune_jax.run`, `study` or `bench`.

Exit codes: 0 done; 2 bad input or config; 3 a folder that cannot be used, a run's or one to write to;
130 interrupted, with what was done saved.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from h2tune_jax.run.interrupt import EXIT_INTERRUPTED

EXIT_INPUT, EXIT_FOLDER = 2, 3

app = typer.Typer(
    name="h2tune",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated fine-tuning of foundation models across architectures and tasks.",
    epilog="Exit codes: 0 done, 2 bad input or config, 3 a folder that cannot be used, "
    "130 interrupted and saved.",
)

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A TOML file; `h2tune init` writes one.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the config, such as method.rank=8 or groups.NAME.count=4; "
        "may be given again.",
    ),
]
Client = Annotated[str, typer.Option(help="A client's name: its group's, a slash, its number.")]


class ExportFormat(StrEnum):
    """What `h2tune export` writes."""

    peft = "peft"
    merged = "merged"
    adapter = "adapter"


def main() -> None:
    """Run the command; the entry point of the installed script."""
    app()


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn what a user can mend into a message on stderr and an exit code, without a traceback."""
    from h2tune_jax.run.disk import RunError
    from h2tune_jax.tasks.assets import AssetError
    from h2tune_jax.types import FederationError

    try:
        yield
    except RunError as error:
        _fail(str(error), EXIT_FOLDER)
    except (FederationError, AssetError) as error:
        _fail(str(error), EXIT_INPUT)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        raise  # nobody reads on: the shell's affair
    except OSError as error:
        place = "" if error.filename is None else f"{error.filename}: "
        _fail(f"{place}{error.strerror or error}", EXIT_FOLDER)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"h2tune: {message}", err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def _watched(observers: list) -> Iterator:
    """Give a stop request for Ctrl-C, and close the display whatever happens."""
    from h2tune_jax.run.interrupt import stop_on_interrupt

    with stop_on_interrupt(lambda text: typer.echo(f"\nh2tune: {text}", err=True)) as asked:
        try:
            yield asked
        finally:
            for observer in observers:
                if hasattr(observer, "close"):
                    observer.close()


def _observers(config) -> list:
    """Build what watches a run, as its config says."""
    found = []
    if config.log.display:
        from h2tune_jax.run.display import Display

        found.append(Display())
    if config.log.tensorboard:
        from h2tune_jax.run.tensorboard import tensorboard

        found.append(tensorboard())
    if config.log.wandb:
        from h2tune_jax.run.wandb import wandb

        found.append(wandb())
    return found


@app.command(epilog="Example: h2tune demo --out runs/demo")
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs and the report go.")] = Path(
        "runs/demo"
    ),
    sets: Sets = None,
) -> None:
    """Run three architectures on three tasks: H2Tune against every client alone.

    Real weights and data, fetched where they are missing; a few minutes on two cores. A demo that was
    interrupted goes on; one that is finished is shown again.
    """
    with reported():
        from h2tune_jax.run.demo import demo_config, format_demo, run_demo

        config = demo_config(sets or ())
        observers = _observers(config)
        with _watched(observers) as asked:
            found = run_demo(config, out, observers=observers, say=typer.echo, stop_request=asked)
        if found.interrupted:
            typer.echo(f"interrupted; go on with: h2tune demo --out {out}", err=True)
            raise typer.Exit(EXIT_INTERRUPTED)
        typer.echo(f"\nAccuracy in percent, recomputed from the last checkpoints in {out}:\n")
        typer.echo(format_demo(found.rows))
        typer.echo(f"\nreport: {found.report}")


@app.command(epilog="Example: h2tune run h2tune.toml --set rounds=20 --out runs/first")
def run(
    config: Config,
    sets: Sets = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder.", show_default="runs/NAME of the config")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what the federation is made of.")
    ] = False,
) -> None:
    """Run a federation.

    Ctrl-C finishes the round, saves, and says how to resume; a second one leaves at once.
    """
    with reported():
        from h2tune_jax.run.config import load_config

        settings = load_config(config, sets or ())
        if dry_run:
            from h2tune_jax.run.describe import describe, format_description

            typer.echo(format_description(describe(settings)))
            return
        from h2tune_jax.run.loop import simulate
        from h2tune_jax.run.report import write_report

        folder = Path("runs", settings.name) if out is None else out
        observers = _observers(settings)
        with _watched(observers) as asked:
            result = simulate(
                settings, out=folder, resume=resume, observers=observers, stop_request=asked
            )
        if result.reason == "interrupted":
            raise typer.Exit(EXIT_INTERRUPTED)
        typer.echo(_final(result))
        typer.echo(f"report: {write_report(folder)}")


def _final(result) -> str:
    """Write the last test: a line a group and moment."""
    lines = []
    for moment, groups in result.final.items():
        for name, metrics in groups.items():
            values = (
                f"{metric} {value:.4g}" for metric, value in metrics.items() if value is not None
            )
            lines.append(f"{name}, {moment}: {', '.join(values)}")
    return "\n".join(lines)


@app.command(epilog="Example: h2tune compare h2tune.toml --methods h2tune,local,fedit --seeds 5")
def compare(
    config: Config,
    methods: Annotated[str, typer.Option(help="Names of methods, with commas between them.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the config's seed on.")] = 3,
    baseline: Annotated[
        str | None,
        typer.Option(help="Whom to compare with.", show_default="local, else the first method"),
    ] = None,
    sets: Sets = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The comparison's folder.", show_default="runs/NAME-compared"),
    ] = None,
) -> None:
    """Compare methods, paired by seed: a table, and a plot in the report, with 95 % intervals.

    What is finished is never run again: the same command goes on with what was interrupted.
    """
    with reported():
        from rich.console import Console

        from h2tune_jax.run import compare as comparing
        from h2tune_jax.run.config import load_config
        from h2tune_jax.run.disk import RunError

        settings = load_config(config, sets or ())
        folder = Path("runs", f"{settings.name}-compared") if out is None else out
        names = [name.strip() for name in methods.split(",") if name.strip()]
        observers = _observers(settings)
        with _watched(observers) as asked:
            try:
                found = comparing.compare(
                    settings, names, seeds, folder, observers,
                    baseline=baseline, stop_request=asked,
                )  # fmt: skip
            except RunError as error:
                if asked():
                    _fail(str(error), EXIT_INTERRUPTED)
                raise
        Console().print(comparing.comparison_table(found))
        typer.echo(f"report: {folder / 'report.html'}")


@app.command(epilog="Example: h2tune report runs/first runs/second --out report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="The file.", show_default="report.html in the first folder")
    ] = None,
) -> None:
    """Write one self-contained HTML file on one run or several."""
    with reported():
        from h2tune_jax.run.folder import RunFolder, is_live, read_facts
        from h2tune_jax.run.report import write_report

        for folder in runs:
            read_facts(RunFolder(folder))  # what is no run is refused by the folder's name
            if is_live(RunFolder(folder)):
                text = f"h2tune: {folder} is under way: the report has what it holds so far"
                typer.echo(text, err=True)
        typer.echo(f"report: {write_report(list(runs), out)}")


@app.command(epilog="Example: h2tune inspect runs/first")
def inspect(run: Run) -> None:
    """Say what is in a run, and which of its checkpoints verify."""
    with reported():
        from rich.console import Console

        from h2tune_jax.run.inspect import inspect_run, inspection_view

        Console().print(inspection_view(inspect_run(run)))


@app.command(
    epilog="Example: h2tune export runs/first --client questions/0 --format adapter --out adapter"
)
def export(
    run: Run,
    client: Client,
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--format",
            help="peft: a PEFT adapter; merged: a Hugging Face model; adapter: our own arrays.",
        ),
    ] = ExportFormat.peft,
    out: Annotated[
        Path | None, typer.Option(help="Where it goes.", show_default="RUN/export/CLIENT-FORMAT")
    ] = None,
) -> None:
    """Write one client's model."""
    with reported():
        from h2tune_jax.run.export import export_client

        opened = _open(run)
        typer.echo(f"written: {export_client(opened, client, form.value, out)}")


def _open(run: Path):
    """Open a run, and say what the reader should know of it."""
    from h2tune_jax.run.use import open_run

    opened = open_run(run)
    for notice in opened.notices:
        typer.echo(f"h2tune: {notice}", err=True)
    return opened


@app.command(epilog='Example: h2tune predict runs/first --client questions/0 "Who wrote Emma?"')
def predict(
    run: Run,
    client: Client,
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts; none reads lines from standard input."),
    ] = None,
) -> None:
    """Say what one client's model makes of texts: a label or a completion a line.

    A text that is a JSON object is a row with the fields that the task reads.
    """
    with reported():
        from h2tune_jax.run import use

        # Before the first text is read, and for all of them: a run under way soon has other rows.
        opened, who = use.open_with(_open(run), client)
        for text in texts or (line.rstrip("\n") for line in sys.stdin):
            typer.echo(use.predict(opened, who, _read_text(text)))


def _read_text(text: str) -> str | dict:
    """Read a row where a text is one."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        row = json.loads(text)
    except ValueError:
        return text  # a text may begin with a brace
    return row if isinstance(row, dict) else text


@app.command(epilog="Example: h2tune init && h2tune run h2tune.toml --dry-run")
def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="The file to write.")] = Path(
        "h2tune.toml"
    ),
) -> None:
    """Write a commented config to start from."""
    from h2tune_jax.run.presets import read_preset

    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(read_preset("init"))
                file.flush()
            except OSError:
                path.unlink()  # half a config is none
                raise
    except FileExistsError:
        _fail(f"{path} exists already; name another file", EXIT_INPUT)
    except OSError as error:
        _fail(f"{path} cannot be written: {error.strerror}", EXIT_INPUT)
    typer.echo(f"written: {path}; look at it, then: h2tune run {path} --dry-run")


# These read their own options, so that `python -m` does as well.
OWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}

study = typer.Typer(no_args_is_help=True, help="Studies of methods.")
app.add_typer(study, name="study")


@study.command(context_settings=OWN_OPTIONS, add_help_option=False)
def convergence(context: typer.Context) -> None:
    """Hold a claimed rate of convergence against gradient norms; the exit code is the verdict."""
    with reported():
        from h2tune_jax.study.convergence import main as study_convergence

        raise typer.Exit(study_convergence(context.args))


@app.command(context_settings=OWN_OPTIONS, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure this machine: clients and tokens a second, compile time, memory, share of the peak."""
    with reported():
        from h2tune_jax.bench.command import main as measure

        raise typer.Exit(measure(context.args))


if __name__ == "__main__":
    main()

"""One self-contained HTML file that shows what runs gave."""

from collections.abc import Sequence
from pathlib import Path

from h2tune_jax.run.disk import make_folder, write_whole, writing
from h2tune_jax.run.report import facts, matrices, progress, tables
from h2tune_jax.run.report.arrays import Inside, read_inside
from h2tune_jax.run.report.page import Section, page
from h2tune_jax.run.report.view import RunView, read_views
from h2tune_jax.types import FederationError

MOST_INSIDE = 3

__all__ = ["write_report"]


def write_report(
    folders: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    baseline: str | None = None,
) -> Path:
    """Write the report of one or several runs, which needs neither their models nor their data.

    Args:
      folders: run folders. The first is the one that the report is about; methods and seeds beside it
        are drawn against it, and compared by seed.
      out: the file; None means `report.html` in the first folder.
      baseline: the method that the others are compared with; None means `local` where it was run, else
        the first.

    Returns:
      The file. It asks the network for nothing, and stays below a few megabytes whatever the number of
      clients and rounds: of many clients it shows quantiles, of many rounds evenly spaced ones.
    """
    if isinstance(folders, str | Path):
        folders = [folders]
    if not folders:
        raise FederationError("report: give at least one run folder")
    views = read_views(folders)
    out = Path(folders[0]) / "report.html" if out is None else Path(out)
    sections = [
        tables.summary(views),
        tables.comparison(views, baseline),
        progress.progress(views),
        tables.clients(views),
        *_insides(views),
        facts.cost(views),
        facts.settings(views),
        facts.environment(views),
    ]
    text = page(_title(views), _subtitle(views), [part for part in sections if part is not None])
    with writing("the report", out, again="try again"):
        make_folder(out.parent)
        # Whole or not at all: somebody may have the old one open.
        write_whole(out, text)
    return out


def _title(views: Sequence[RunView]) -> str:
    # A name may say the method already.
    bare = (view.name.removesuffix(view.method).strip(" -_") or view.name for view in views)
    names = list(dict.fromkeys(bare))
    methods = list(dict.fromkeys(view.method for view in views))
    against = methods[0] + (f" against {', '.join(methods[1:])}" if len(methods) > 1 else "")
    return f"{', '.join(names[:3])}: {against}"


def _subtitle(views: Sequence[RunView]) -> str:
    groups = tables.groups_of(views)
    clients = sum(len(group.clients) for group in groups)
    tasks = len({group.task for group in groups})
    seeds = sorted({view.seed for view in views})
    count = lambda number, word: f"{number:,} {word}{'' if number == 1 else 's'}"
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds[:10]))}"
    parts = [count(len(views), "run"), count(len(groups), "group"), count(clients, "client")]
    return ", ".join([*parts, count(tasks, "task"), seed])


def _insides(views: Sequence[RunView]) -> list[Section]:
    """Look into the newest good checkpoint of each method's first run."""
    first = {view.method: view for view in reversed(views)}
    parts = []
    for view in [view for view in views if first[view.method] is view][:MOST_INSIDE]:
        read, why = _read_inside(view)
        parts.append(matrices.inside_section(view, read, why))
    return parts


def _read_inside(view: RunView) -> tuple[Inside | None, str]:
    """Read a run's newest good checkpoint: -> (it or None, why there is none)."""
    if not (view.folder / "checkpoints").is_dir():
        return None, "the run has no checkpoints."
    try:
        return read_inside(view.folder, len(view.groups)), ""
    except (FederationError, OSError) as error:
        return None, f"no checkpoint can be read. {error}"

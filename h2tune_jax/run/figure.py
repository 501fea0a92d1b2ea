"""Figures as files."""

import os
from pathlib import Path
from typing import Any


def save_figure(figure: Any, file: str | os.PathLike) -> None:
    """Write a matplotlib figure without dates and random ids: the same rows give the same file."""
    from matplotlib import rc_context

    is_svg = Path(file).suffix == ".svg"
    with rc_context({"svg.hashsalt": "h2tune"}):
        figure.savefig(file, metadata={"Date": None} if is_svg else None)

"""Rows as a table, for a terminal or in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
HEADS = (
    "model",
    "clients",
    "axis",
    "rank",
    "kernels",
    "devices",
    "method",
    "s a round",
    "clients/s",
    "tokens/s",
    "compile s",
    "peak GB",
    "GFLOP/s",
    "of peak",
)


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits, with thousands apart; a dash for None."""
    if value is None:
        return "-"
    if value >= 10**digits:
        rounded = float(f"{value:.{digits}g}")
        return f"{rounded:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def with_spread(median: float | None, low: float | None, high: float | None) -> str:
    """Write a median and its quartiles."""
    return "-" if median is None else f"{number(median)} ({number(low)}-{number(high)})"


def cells(row: Row) -> list[str]:
    """One row under `HEADS`; a skipped case has its reason instead of numbers."""
    case = [str(row[name]) for name in HEADS[:7]]
    case[3] = case[3] if row["rank"] else "-"
    if row["skipped"]:
        return [*case, f"skipped: {row['skipped']}", *[""] * 6]
    memory = None if row["peak_bytes"] is None else row["peak_bytes"] / 1e9
    return [
        *case,
        with_spread(row["seconds"], row["seconds_low"], row["seconds_high"]),
        number(row["clients_per_second"]),
        number(row["tokens_per_second"]),
        with_spread(row["compile_seconds"], row["compile_low"], row["compile_high"]),
        number(memory),
        number(row["gflops"]),
        f"{100 * row['share_of_peak']:.0f} %",
    ]


def plain(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Lay a table out in columns; what is skipped does not widen them."""
    body = list(body)
    fits = [line for line in body if not any(cell.startswith("skipped") for cell in line)]
    widths = [max(len(line[i]) for line in [heads, *fits]) for i in range(len(heads))]
    write = lambda line: "  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip()
    return "\n".join(write(line) for line in [heads, *body])


def markdown(heads: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Lay a table out in Markdown."""
    write = lambda line: "| " + " | ".join(line) + " |"
    return "\n".join([write(heads), "|" + "---|" * len(heads), *map(write, body)])

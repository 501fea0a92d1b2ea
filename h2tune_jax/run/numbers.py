"""Numbers as people read them."""

import math

MISSING = "–"


def number(value: float | None) -> float:
    """Read a number that JSON may have as null."""
    return math.nan if value is None else float(value)


def share(value: float | None) -> str:
    """Format a share as a percentage: 0.8123 -> 81.2 %."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def plain(value: float | None) -> str:
    """Format a number with four significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.4g}"


def value_of(metric: str, value: float | None) -> str:
    """Format a metric's value: shares as percentages, anything else as a number."""
    return share(value) if is_share(metric) else plain(value)


def difference_of(metric: str, value: float | None) -> str:
    """Format a difference with its sign; of shares in percentage points."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{100 * value:+.1f}" if is_share(metric) else f"{value:+.4g}"
    return text.replace("-", "−")


def spread_of(metric: str, value: float | None) -> str:
    """Format a standard deviation, to stand behind its mean; nothing where there is none."""
    return "" if value is None else f" ± {difference_of(metric, value).lstrip('+')}"


def is_share(metric: str) -> bool:
    """Say whether a metric lies between 0 and 1."""
    return metric.endswith(("accuracy", "f1", "match"))


def size(count: float | None) -> str:
    """Format bytes in powers of 1000."""
    if count is None or not math.isfinite(count):
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count = count / 1000
    return f"{count:.3g} TB"


def duration(seconds: float | None) -> str:
    """Format a time: 0.35 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

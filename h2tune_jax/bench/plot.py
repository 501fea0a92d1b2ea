"""Clients a second over the number of clients, and share of the peak rate by model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from h2tune_jax.run.figure import save_figure


def draw(rows: Iterable[Mapping[str, Any]], file: Path) -> None:
    """Write the plot; needs matplotlib (the extra `plot`). Bars and whiskers are medians and quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if not row["skipped"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    plain = lambda r: r["devices"] == 1 and r["kernels"] == "xla" and r["method"] != "h2tune"
    lines: dict[tuple, list] = {}
    for row in filter(plain, rows):
        if row["rank"] in (0, 8):
            lines.setdefault((row["model"], row["axis"]), []).append(row)
    for (model, axis), group in lines.items():
        group.sort(key=lambda row: row["clients"])
        count = [row["clients"] for row in group]
        rate = [row["clients"] / row["seconds"] for row in group]
        low = [r - row["clients"] / row["seconds_high"] for r, row in zip(rate, group)]
        high = [row["clients"] / row["seconds_low"] - r for r, row in zip(rate, group)]
        left.errorbar(count, rate, [low, high], marker="o", capsize=2, label=f"{model}, {axis}")
    left.set(xscale="log", yscale="log", xlabel="clients in a round", ylabel="clients per second")
    left.legend(fontsize=7)
    best: dict[str, float] = {}
    for row in rows:
        best[row["model"]] = max(best.get(row["model"], 0.0), row["share_of_peak"])
    right.barh(list(best), [100 * share for share in best.values()])
    right.set(xlabel="best share of the measured matrix peak, per cent")
    right.invert_yaxis()
    figure.suptitle(f"{rows[0]['device']}, jax {rows[0]['jax']}" if rows else "nothing measured")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, file)
    plt.close(figure)

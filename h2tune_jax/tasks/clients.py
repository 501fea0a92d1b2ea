"""Put the clients' arrays together, and show what each client holds."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from h2tune_jax.tasks.encoding import Examples, number_labels
from h2tune_jax.types import ClientData, FederationError


def take_rows(examples: Examples, rows: np.ndarray) -> Examples:
    """Return the given rows of every array."""
    return {name: leaf[rows] for name, leaf in examples.items()}


def stack_clients(
    clients: Mapping[Any, Examples] | Sequence[Examples], *, room: int | None = None
) -> ClientData:
    """Stack the arrays of a cohort's clients on a leading axis.

    Clients with fewer examples are filled up by repeating their first, so that the padding is a real
    input, which no model answers with NaN; `num_examples` tells which rows count.

    Args:
      clients: one dict of arrays [n_i, ...] a client; a mapping also gives the names for errors.
      room: n, the rows that each client gets room for; None: as many as the largest client has.

    Raises:
      FederationError: for an empty client, and for fields, shapes or types that differ between
        clients; it names the client and the field.
    """
    named = dict(clients) if isinstance(clients, Mapping) else dict(enumerate(clients))
    if not named:
        raise FederationError("there is no client")
    first_name, first = next(iter(named.items()))
    counts = {name: _count(name, examples) for name, examples in named.items()}
    size = max(counts.values()) if room is None else room
    for name, examples in named.items():
        if counts[name] > size:
            raise FederationError(
                f"client {name!r}: {counts[name]} examples, but there is room for {size}"
            )
        if set(examples) != set(first):
            odd = sorted(set(examples) ^ set(first))[0]
            raise FederationError(
                f"clients {first_name!r} and {name!r}: only one of them has the field {odd!r}"
            )
        for field, leaf in examples.items():
            if leaf.shape[1:] != first[field].shape[1:] or leaf.dtype != first[field].dtype:
                raise FederationError(
                    f"client {name!r}: field {field!r} is {leaf.dtype}{list(leaf.shape[1:])} a row; "
                    f"client {first_name!r} has {first[field].dtype}{list(first[field].shape[1:])}"
                )
    stacked = {}
    for field in first:
        leaves = [examples[field] for examples in named.values()]
        rows = [np.where(np.arange(size) < len(leaf), np.arange(size), 0) for leaf in leaves]
        stacked[field] = jnp.asarray(np.stack([leaf[r] for leaf, r in zip(leaves, rows)]))
    return ClientData(stacked, jnp.asarray(list(counts.values()), jnp.int32))


def _count(name: Any, examples: Examples) -> int:
    sizes = {field: len(leaf) for field, leaf in examples.items()}
    if not sizes or min(sizes.values()) == 0:
        raise FederationError(f"client {name!r} is empty: it has no examples")
    if len(set(sizes.values())) > 1:
        raise FederationError(f"client {name!r}: the fields have different lengths: {sizes}")
    return next(iter(sizes.values()))


def make_clients(
    examples: Examples,
    parts: Sequence[np.ndarray] | Mapping[Any, np.ndarray],
    *,
    room: int | None = None,
) -> ClientData:
    """Give each client its rows of a data set; `parts` is what a partitioner returned."""
    named = parts if isinstance(parts, Mapping) else dict(enumerate(parts))
    return stack_clients(
        {name: take_rows(examples, rows) for name, rows in named.items()}, room=room
    )


def count_holdings(
    parts: Sequence[np.ndarray] | Mapping[Any, np.ndarray],
    labels: Sequence[Any] | np.ndarray,
    label_names: Sequence[str],
) -> np.ndarray:  # i64[C, V]
    """Count each client's examples by label.

    Labels are names of `label_names` or, as an array of integers, what `encode_labels` made of them.
    """
    numbers = number_labels(labels, label_names)
    each = parts.values() if isinstance(parts, Mapping) else parts
    counts = [np.bincount(numbers[rows], minlength=len(label_names)) for rows in each]
    return np.stack(counts).astype(np.int64)


def format_holdings(
    counts: np.ndarray,  # i64[C, V]
    label_names: Sequence[str],
    *,
    client_names: Sequence[Any] | None = None,
) -> str:
    """Write the counts as a table of text, with sums."""
    clients = list(range(len(counts))) if client_names is None else list(client_names)
    header = ["client", *map(str, label_names), "all"]
    body = [
        [str(name), *map(str, row.tolist()), str(row.sum())] for name, row in zip(clients, counts)
    ]
    total = ["all", *map(str, counts.sum(axis=0).tolist()), str(counts.sum())]
    table = [header, *body, total]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths)) for line in table]
    return "\n".join(lines) + "\n"


def plot_holdings(
    counts: np.ndarray,  # i64[C, V]
    label_names: Sequence[str],
    path: str | os.PathLike,
    *,
    client_names: Sequence[Any] | None = None,
) -> None:
    """Draw what each client holds, one stacked bar a client, into a file (needs extra `plot`)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore
        from matplotlib.figure import Figure  # pyright: ignore
    except ImportError:
        raise FederationError(
            "a plot needs the extra `plot`: pip install 'h2tune-jax[plot]'; "
            "`format_holdings` writes the same as text"
        ) from None
    clients = list(range(len(counts))) if client_names is None else list(client_names)
    figure = Figure(figsize=(7.0, 1.2 + 0.3 * len(counts)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = np.zeros(len(counts))
    for name, column in zip(label_names, counts.T):
        axes.barh(np.arange(len(counts)), column, left=left, label=str(name))
        left = left + column
    axes.set_yticks(np.arange(len(counts)), [str(name) for name in clients])
    axes.invert_yaxis()
    axes.set_xlabel("examples")
    axes.set_ylabel("client")
    figure.legend(loc="outside upper center", ncols=min(6, len(label_names)))
    figure.savefig(path)

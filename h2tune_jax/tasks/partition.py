"""Cut a data set into splits, and a split into clients.

Everything is fixed by a seed. Splits depend on what the rows say, not on where they stand, so a
shuffled or re-read file is split alike, and repeats of a row never fall into two splits.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from h2tune_jax.types import FederationError

Parts = tuple[np.ndarray, ...]
"""Row numbers i64 of each client, ascending; together they are a part of all rows, without repeats."""


def split_rows(
    rows: Sequence[Any],
    sizes: Mapping[str, int | float | None],
    *,
    seed: int,
    by: Callable[[Any], Any] | None = None,
) -> dict[str, np.ndarray]:
    """Split rows into train, validation, test, or whatever the names are.

    Rows are ordered by a digest of the seed and their content, and dealt out in that order.

    Args:
      rows: anything that JSON can write, such as the dicts of `read_rows`.
      sizes: for each split a number of rows (int), a share of all rows (float), or None for all that
        is left, in the order in which they are served.
      seed: of the digest.
      by: what of a row counts as its content, such as its text, or its writer; rows in which that is
        equal stay together. A split may be larger than asked by the repeats of its last row.

    Returns:
      The row numbers of each split, in the digest's order.
    """
    contents = [row if by is None else by(row) for row in rows]
    digests = [_digest(seed, content) for content in contents]
    order = sorted(range(len(rows)), key=lambda i: (digests[i], i))
    parts: dict[str, np.ndarray] = {}
    start = 0
    for name, size in sizes.items():
        if size is None:
            wanted = len(rows) - start
        elif isinstance(size, float):
            wanted = round(size * len(rows))
        else:
            wanted = size
        if wanted < 1 or start + wanted > len(rows):
            raise FederationError(
                f"split {name!r}: {wanted} rows are asked for, {len(rows) - start} of {len(rows)} "
                "are left"
            )
        end = start + wanted
        while end < len(rows) and digests[order[end]] == digests[order[end - 1]]:
            end += 1
        parts[name] = np.array(order[start:end], np.int64)
        start = end
    return parts


def _digest(seed: int, content: Any) -> bytes:
    try:
        text = json.dumps([seed, content], sort_keys=True, ensure_ascii=True)
    except TypeError as error:
        raise FederationError(f"a row cannot be written as JSON ({error}); give `by`") from None
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def partition_iid(num_rows: int, num_clients: int, rng: np.random.Generator) -> Parts:
    """Deal rows out at random: the clients' numbers of rows differ by one at most."""
    _check_room(num_rows, num_clients)
    shuffled = rng.permutation(num_rows)
    return tuple(np.sort(part) for part in np.array_split(shuffled, num_clients))


def partition_dirichlet(
    labels: Sequence[Any] | np.ndarray,
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    *,
    min_examples: int = 1,
    max_draws: int = 100,
) -> Parts:
    """Give each class to the clients in shares drawn from a Dirichlet distribution.

    Small `alpha` makes clients of few classes, large `alpha` makes them alike. The whole draw is
    repeated until every client has `min_examples`; after `max_draws` it is an error.
    """
    if not alpha > 0:
        raise FederationError(f"dirichlet: alpha must be positive, got {alpha}")
    classes = _rows_of_classes(labels)
    _check_room(sum(map(len, classes.values())), num_clients * min_examples)
    smallest = 0
    for _ in range(max_draws):
        parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
        for members in classes.values():
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for part, piece in zip(parts, np.split(rng.permutation(members), cuts)):
                part.append(piece)
        joined = tuple(np.sort(np.concatenate(part)) for part in parts)
        smallest = max(smallest, min(map(len, joined)))
        if min(map(len, joined)) >= min_examples:
            return joined
    raise FederationError(
        f"dirichlet: in {max_draws} draws with alpha {alpha} some of the {num_clients} clients always "
        f"had fewer than {min_examples} examples (at best {smallest}); raise alpha or max_draws, "
        "or have fewer clients"
    )


def partition_pathological(
    labels: Sequence[Any] | np.ndarray,
    num_clients: int,
    classes_per_client: int,
    rng: np.random.Generator,
) -> Parts:
    """Give every client exactly so many classes; a class is shared out evenly among its holders.

    Classes' numbers of holders differ by one at most. Every class is held by someone: fewer places than
    classes is an error, as is a class with fewer rows than holders.
    """
    classes = _rows_of_classes(labels)
    names = list(classes)
    if not 1 <= classes_per_client <= len(names):
        raise FederationError(
            f"pathological: classes_per_client must lie in 1 to {len(names)}, the number of classes, "
            f"got {classes_per_client}"
        )
    if num_clients * classes_per_client < len(names):
        raise FederationError(
            f"pathological: {num_clients} clients with {classes_per_client} classes each cannot hold "
            f"all {len(names)} classes"
        )
    holders: list[list[int]] = [[] for _ in names]
    for client in range(num_clients):
        # The least held classes first, ties at random.
        counts = np.array([len(h) for h in holders])
        for c in np.lexsort((rng.permutation(len(names)), counts))[:classes_per_client]:
            holders[c].append(client)
    parts: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for name, members, clients in zip(names, classes.values(), holders):
        if len(members) < len(clients):
            raise FederationError(
                f"pathological: class {name!r} has {len(members)} rows for {len(clients)} clients"
            )
        for client, piece in zip(clients, np.array_split(rng.permutation(members), len(clients))):
            parts[client].append(piece)
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def partition_by_key(keys: Sequence[Any], *, min_examples: int = 1) -> Parts:
    """Make a client of each key, such as a writer, in the order of the sorted keys.

    `sorted(set(keys))` names the clients. Keys with fewer than `min_examples` rows are an error that
    names the first of them.
    """
    parts = _rows_of_classes(keys)
    for key, members in parts.items():
        if len(members) < min_examples:
            raise FederationError(
                f"by_key: client {key!r} has {len(members)} examples, fewer than {min_examples}"
            )
    return tuple(parts.values())


def _rows_of_classes(labels: Sequence[Any] | np.ndarray) -> dict[Any, np.ndarray]:
    """Row numbers by label, in the order of the labels."""
    values = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    members: dict[Any, list[int]] = {}
    for i, value in enumerate(values):
        members.setdefault(value, []).append(i)
    return {name: np.array(members[name], np.int64) for name in sorted(members)}


def _check_room(num_rows: int, needed: int) -> None:
    if needed < 1:
        raise FederationError("a partition needs at least one client")
    if num_rows < needed:
        raise FederationError(f"{num_rows} rows cannot give {needed} to the clients together")

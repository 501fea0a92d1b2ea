"""What a checkpoint's arrays say of a method's inside, without building models.

Arrays are found by the names of the state's fields, whatever writes the path between them: the tokens
of `.clients[0].relation` are `clients`, `0`, `relation`.
"""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from h2tune_jax.run.disk import Gone
from h2tune_jax.run.folder import RunFolder
from h2tune_jax.types import order_kinds

Arrays = Mapping[tuple[str, ...], np.ndarray]

MOST_CLIENTS = 64

_TRIES = 5


class Inside(NamedTuple):
    """A checkpoint's arrays; those of clients lead with the clients of the cohort that are here."""

    rounds: int  # done
    arrays: Arrays
    clients: tuple[np.ndarray, ...]  # a cohort, i[N]: the ids that the leading axis stands for
    is_sample: bool  # not all of those that the checkpoint holds


def read_inside(folder: Path, cohorts: int) -> Inside:
    """Read the newest checkpoint that verifies; of stores of rows, at most 64 clients a cohort.

    Raises `RunError` where nothing can be read.
    """
    for _ in range(_TRIES - 1):
        with contextlib.suppress(Gone):  # a run under way has gone on, and has a newer one
            return _read_inside(folder, cohorts)
    return _read_inside(folder, cohorts)


def _read_inside(folder: Path, cohorts: int) -> Inside:
    # Orbax takes a second to import, which a report without checkpoints does not need.
    from h2tune_jax.run.checkpoint import read_arrays

    arrays, meta = read_arrays(folder)
    found = by_tokens(arrays)
    if meta.get("store", "device") == "device":
        counts = [
            max((len(a) for path, a in found.items() if path[:2] == ("clients", str(i))), default=0)
            for i in range(cohorts)
        ]
        return Inside(meta["round"], found, tuple(map(np.arange, counts)), False)

    from h2tune_jax.run.row_store import clients_of
    from h2tune_jax.run.rows import index_from

    every, chosen, sampled = dict(found), [], False
    for cohort in range(cohorts):
        held = np.asarray(sorted(index_from(arrays[f".index[{cohort}]"])), np.int64)
        ids = spaced(held, MOST_CLIENTS)
        sampled |= len(ids) < len(held)
        ids, rows = clients_of(RunFolder(folder), arrays, meta, cohort, ids.tolist())
        every |= {("clients", str(cohort), *path): rows for path, rows in by_tokens(rows).items()}
        chosen.append(ids)
    return Inside(meta["round"], every, tuple(chosen), sampled)


def spaced(items: np.ndarray, most: int) -> np.ndarray:
    """Keep at most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    return items[np.linspace(0, len(items) - 1, most).round().astype(int)]


def by_tokens(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Key arrays by the words of their paths."""
    return {tuple(re.findall(r"[\w-]+", path)): array for path, array in arrays.items()}


class Relations(NamedTuple):
    """H2Tune's personal state of a cohort, as far as a report draws it."""

    kinds: tuple[str, ...]
    relation: np.ndarray  # [C, L, Li]
    active: np.ndarray  # i[C, Li, Ki, r*r]
    middle: np.ndarray  # [C, Li, Ki, R, R]
    trained: np.ndarray  # bool[C]


def relations_of(arrays: Arrays, cohort: int) -> Relations | None:
    """Find what H2Tune holds for a cohort; None for another method."""
    at = "clients", str(cohort)
    fields = [arrays.get((*at, name)) for name in ("relation", "active", "middle", "trained")]
    relation, active, middle, trained = fields
    if relation is None or active is None or middle is None or trained is None:
        return None
    # bfloat16 is no type that numpy computes in.
    full = lambda array: np.asarray(array).astype(np.float32)
    kinds = order_kinds(path[3] for path in arrays if path[:3] == (*at, "a") and len(path) == 4)
    return Relations(kinds, full(relation), np.asarray(active), full(middle), np.asarray(trained))


class Factors(NamedTuple):
    """The outer factors of one kind of site, for all clients of a cohort."""

    a: np.ndarray  # [C, Li, D, r]
    b: np.ndarray  # [C, Li, r, F]


def factors_of(arrays: Arrays, cohort: int) -> dict[str, Factors]:
    """Find pairs of low-rank factors of a cohort by kind: what stands under `a` and `b`."""
    found = {}
    for path, a in arrays.items():
        if path[:2] != ("clients", str(cohort)) or len(path) < 4 or path[-2] != "a":
            continue
        b = arrays.get((*path[:-2], "b", path[-1]))
        if b is not None and a.ndim == 4 and b.ndim == 4 and a.shape[-1] == b.shape[-2]:
            found[path[-1]] = Factors(a.astype(np.float32), b.astype(np.float32))
    return found


def read_back(relations: Relations, client: int) -> dict[str, np.ndarray]:
    """Bring a client's middle matrices to the shared slots: by kind, G[j] = sum_l P[j, l] M[l]."""
    slots = np.tensordot(relations.relation[client], relations.middle[client], axes=(1, 0))
    return {kind: slots[:, place] for place, kind in enumerate(relations.kinds)}


def selected_share(relations: Relations, clients: np.ndarray) -> np.ndarray:
    """Return how often each entry of the middle matrices is selected, over clients and layers.

    [Ki, R, R], each between 0 and 1.
    """
    size, kinds = relations.middle.shape[-1], len(relations.kinds)
    chosen = relations.active[clients]  # [c, Li, Ki, r*r]
    share = np.zeros((kinds, size * size))
    for place in range(kinds):
        share[place] = np.bincount(chosen[:, :, place].ravel(), minlength=size * size)
    return (share / max(chosen.shape[0] * chosen.shape[1], 1)).reshape(kinds, size, size)


def cosine_of_slots(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Return the cosine of two clients' matrices over the kinds that both have; NaN where one is 0."""
    shared = [kind for kind in one if kind in other]
    dot = sum(float(np.vdot(one[kind], other[kind])) for kind in shared)
    lengths = [sum(float(np.vdot(x[k], x[k])) for k in shared) for x in (one, other)]
    return dot / np.sqrt(lengths[0] * lengths[1]) if min(lengths, default=0) > 0 else np.nan


def update_products(
    one: Mapping[str, Factors], i: int, other: Mapping[str, Factors], j: int
) -> float:
    """Return the inner product of two clients' updates A B over all sites, from r x r products alone."""
    total = 0.0
    for kind, mine in one.items():
        theirs = other[kind]
        inner = np.matmul(mine.a[i].swapaxes(-1, -2), theirs.a[j])
        outer = np.matmul(mine.b[i], theirs.b[j].swapaxes(-1, -2))
        total += float(np.vdot(inner, outer))
    return total


def comparable(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> bool:
    """Say whether two cohorts' updates have equal shapes, whatever their ranks."""
    shape = lambda f: (*f.a.shape[1:3], f.b.shape[-1])
    return bool(one) and {k: shape(f) for k, f in one.items()} == {
        k: shape(f) for k, f in other.items()
    }

"""Selection, sparse cores and the mixing of layers in plain NumPy, float64."""

import math

import numpy as np


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the places of the largest values in index order; of equals the lower index."""
    return np.sort(np.argsort(-values, kind="stable")[:count])


def select(
    strategy: str, rank: int, middle: np.ndarray, scores: np.ndarray | None, born: np.ndarray
) -> np.ndarray:
    """Choose r * r places at every site: -> [Li, Ki, r * r]."""
    if strategy == "random":
        return born
    size = middle.shape[-1]
    index = np.zeros((*middle.shape[:2], rank * rank), int)
    for site in np.ndindex(*middle.shape[:2]):
        if strategy in ("block", "leading"):
            block = strategy == "block"
            chosen = largest(scores[site], rank) if block else np.arange(rank)
            index[site] = (chosen[:, None] * size + chosen[None, :]).ravel()
        elif strategy == "magnitude":
            index[site] = largest(np.abs(middle[site]).ravel(), rank * rank)
        else:
            assert strategy in ("score", "score_frozen")
            index[site] = largest(scores[site].ravel(), rank * rank)
    return index


def gather(middle: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Take the cores: [Li, Ki, R, R] -> [Li, Ki, r, r]."""
    rank = math.isqrt(index.shape[-1])
    core = np.zeros((*index.shape[:2], rank, rank))
    for site in np.ndindex(*index.shape[:2]):
        core[site] = middle[site].ravel()[index[site]].reshape(rank, rank)
    return core


def scatter(core: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """Put cores in their places, zeros elsewhere: the transpose of `gather`."""
    middle = np.zeros((*index.shape[:2], size * size))
    for site in np.ndindex(*index.shape[:2]):
        middle[site][index[site]] = core[site].ravel()
    return middle.reshape(*index.shape[:2], size, size)


def selected_entries(index: np.ndarray, size: int) -> np.ndarray:
    """Say which entries are selected: bool[Li, Ki, R, R]."""
    rank = math.isqrt(index.shape[-1])
    return scatter(np.ones((*index.shape[:2], rank, rank)), index, size) > 0


def mix(relation: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """M[l, k] = sum_j P[j, l] G[j, k]."""
    return np.einsum("jl,jkab->lkab", relation, shared)


def unmix(relation: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """G[j, k] = sum_l P[j, l] M[l, k]."""
    return np.einsum("jl,lkab->jkab", relation, middle)


def reach(support: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Say which entries of G speak to selected entries of some layer: bool[L, Ki, R, R]."""
    return np.einsum("jl,lkab->jkab", support.astype(int), entries.astype(int)) > 0

"""Trees as arrays by path, and digests that tell whether bytes are what they were."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from h2tune_jax.run.disk import RunError
from h2tune_jax.types import PyTree

Arrays = dict[str, np.ndarray]


class Broken(Exception):
    """What bytes say of themselves: they are not what was written. Never an error of the machine."""


def flatten(tree: PyTree, prefix: str = "") -> dict[str, Any]:
    """Return a tree's leaves by path: ".server.middle", ".clients[0].a['q']"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {prefix + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def unflatten(like: PyTree, arrays: Mapping[str, np.ndarray], prefix: str = "") -> PyTree:
    """Put arrays in the places of `like` (arrays or shapes); `RunError` where they do not fit."""

    def place(path: Any, leaf: Any) -> np.ndarray:
        name = prefix + jax.tree_util.keystr(path)
        found = arrays.get(name)
        if found is None:
            raise RunError(f"the checkpoint has no {name}; it is of another federation or method")
        if found.shape != tuple(leaf.shape) or found.dtype != leaf.dtype:
            raise RunError(
                f"the checkpoint's {name} is {found.dtype}{list(found.shape)}, expected "
                f"{leaf.dtype}{list(leaf.shape)}; it is of another federation or method"
            )
        return found

    return jax.tree_util.tree_map_with_path(place, like)


def array_digest(array: np.ndarray) -> str:
    """Return the SHA-256 of an array's type, shape and bytes."""
    digest = hashlib.sha256(f"{array.dtype}{list(array.shape)}".encode())
    if array.size:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def state_digest(state: PyTree) -> str:
    """Return one SHA-256 over every array of a tree and its path: equal where all bits are."""
    named = {path: array_digest(np.asarray(leaf)) for path, leaf in flatten(state).items()}
    return json_digest(named)


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a value of JSON, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path, size: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first `size` bytes; `Broken` where it has fewer."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        while left:
            block = file.read(min(left, 1 << 22))
            if not block:
                raise Broken(f"{path.name} is shorter than it was")
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()

"""How a leaf of our base corresponds to a tensor of a Hugging Face file, both ways."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax.types import PyTree


class Tensor(NamedTuple):
    """One leaf of the base and the tensor it comes from.

    `name` holds `{}` where the layer number goes; such a leaf is stacked [Li, ...]. `form`:
    "same"; "transpose", for weights that torch keeps as [out, in]; "lead", the same behind axes of
    length 1; "patch", a convolution [d, c, p, p] used as [c*p*p, d]. `part` is (i, n) for the i-th of
    n equal pieces of the file tensor's last axis.
    """

    path: tuple[str, ...]
    name: str
    form: str = "same"
    part: tuple[int, int] | None = None

    @property
    def stacked(self) -> bool:
        """Whether one such tensor exists for each layer."""
        return "{}" in self.name

    def file_shape(self, shape: tuple[int, ...], patch: tuple[int, int]) -> tuple[int, ...]:
        """Return the file tensor's shape, given our leaf's without layers and (channels, patch)."""
        if self.form == "transpose":
            return shape[::-1]
        if self.form == "lead":
            return (1,) * (3 - len(shape)) + shape
        if self.form == "patch":
            return (shape[1], patch[0], patch[1], patch[1])
        if self.part is not None:
            return (*shape[:-1], shape[-1] * self.part[1])
        return shape

    def read(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Turn a file tensor into our leaf's form (a view where possible)."""
        if self.form == "transpose":
            return array.T
        if self.form == "patch":
            return array.reshape(array.shape[0], -1).T
        if self.part is not None:
            width = shape[-1]
            return array[..., self.part[0] * width : (self.part[0] + 1) * width]
        return array.reshape(shape)

    def write(self, array: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
        """Turn our leaf back into (its piece of) the file tensor."""
        if self.form == "transpose":
            return array.T
        if self.form == "patch":
            return array.T.reshape(self.file_shape(array.shape, patch))
        if self.form == "lead":
            return array.reshape(self.file_shape(array.shape, patch))
        return array


def linear(path: tuple[str, ...], name: str, *, bias: bool) -> list[Tensor]:
    """List weight and bias of a torch linear layer."""
    weight = Tensor((*path, "w"), f"{name}.weight", "transpose")
    return [weight, Tensor((*path, "b"), f"{name}.bias")] if bias else [weight]


def norm(path: tuple[str, ...], name: str, *, bias: bool) -> list[Tensor]:
    """List scale and bias of a norm."""
    weight = Tensor((*path, "w"), f"{name}.weight")
    return [weight, Tensor((*path, "b"), f"{name}.bias")] if bias else [weight]


def get_leaf(tree: Mapping[str, Any], path: Iterable[str]) -> Any:
    """Return the leaf at a path of keys."""
    for key in path:
        tree = tree[key]
    return tree


def set_leaf(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    """Put a leaf at a path of keys, making dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def leaf_paths(tree: PyTree, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """List the paths of all leaves of nested dicts."""
    if not isinstance(tree, Mapping):
        return [prefix]
    return [path for key in tree for path in leaf_paths(tree[key], (*prefix, key))]

"""Classifier heads, in the form that each family's Hugging Face classifier has; always in float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.models.config import ModelConfig
from h2tune_jax.types import Array, FederationError

HEAD_STD = 0.02


class HeadForm(NamedTuple):
    """What a family's classifier looks like, and what its tensors are called.

    `modules` lists (key in our head, module name in the file); with two, the first is a dense
    layer d -> d with tanh before the second. `pool` says which token is read: "first" or "last".
    """

    modules: tuple[tuple[str, str], ...]
    bias: bool
    pool: str

    @property
    def root(self) -> str:
        """The module of the classifier as a whole."""
        return self.modules[0][1].split(".")[0]


def init_head(form: HeadForm, width: int, num_labels: int) -> Callable[[Array], dict[str, Any]]:
    """Return key -> parameters of a fresh head: normal(0.02) weights, zero biases."""
    if num_labels < 1:
        raise FederationError(f"num_labels must be at least 1, got {num_labels}")
    widths = [(width, width)] * (len(form.modules) - 1) + [(width, num_labels)]

    def init(key: Array) -> dict[str, Any]:
        head = {}
        for (name, _), shape, k in zip(
            form.modules, widths, jax.random.split(key, len(widths)), strict=True
        ):
            head[name] = {"w": HEAD_STD * jax.random.normal(k, shape, jnp.float32)}
            if form.bias:
                head[name]["b"] = jnp.zeros(shape[1], jnp.float32)
        return head

    return init


def pool(
    hidden: Array,  # [B, T, d]
    token_mask: Array,  # bool[B, T]
    form: HeadForm,
    config: ModelConfig,
) -> Array:  # [B, d]
    """Reduce a text to one vector: its first token, its last, or the mean of all."""
    if config.pooling == "mean":
        weight = token_mask.astype(jnp.float32)[..., None]
        total = (hidden.astype(jnp.float32) * weight).sum(axis=1)
        return total / jnp.maximum(weight.sum(axis=1), 1)
    steps = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None, :]
    if form.pool == "first":
        at = jnp.argmax(token_mask, axis=1)
    else:
        at = jnp.argmax(jnp.where(token_mask, steps, -1), axis=1)
    return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]


def apply_head(head: dict[str, Any], x: Array, form: HeadForm) -> Array:  # [B, d] -> f32[B, labels]
    """Compute logits from pooled hidden states."""
    x = x.astype(jnp.float32)
    for i, (name, _) in enumerate(form.modules):
        if name not in head:
            raise FederationError(f"head: {name!r} is missing; it has {', '.join(map(str, head))}")
        x = x @ head[name]["w"].astype(jnp.float32)
        if form.bias:
            x = x + head[name]["b"].astype(jnp.float32)[None, :]
        if i < len(form.modules) - 1:
            x = jnp.tanh(x)
    return x

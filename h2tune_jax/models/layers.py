"""The pieces that every family is put together from: adapted products, norms, feed-forward, the stack.

Flax gives three things here: one declaration of each parameter (its name, shape and start, against
which imported files are checked), the lifted scan and remat over layers, and `sow`, by which
activations come out of a scanned stack without a second forward function.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from h2tune_jax.adapters.block import BLOCK, beside_block
from h2tune_jax.adapters.site import adapted
from h2tune_jax.models.config import ModelConfig
from h2tune_jax.types import KINDS, Array

MEANS = "means"
TOKENS = "tokens"
"""Collections of recorded activations: averaged over the tokens of a text, or token by token."""

_normal = nn.initializers.normal(0.02)


class Context(NamedTuple):
    """What all layers share in one forward pass."""

    token_mask: Array  # bool[B, T]
    masks: tuple[Array, ...]  # bool[B, 1, T, S] each: one for all layers, or (full, windowed)
    rope: tuple[Array, Array] | None  # f32[B, T, head_dim/2] cosines and sines
    slot: Array | None  # i32[], where in the cache this input starts


class LayerInputs(NamedTuple):
    """What one layer gets for itself; stacked over layers [Li, ...] outside the scan."""

    sites: dict[str, Any]
    key: Array | None
    local: Array | None  # bool[], whether the layer attends in its window only
    cache: tuple[Array, Array] | None  # T[B, S, K, head_dim] keys and values


def record(module: nn.Module, name: str, x: Array, context: Context) -> None:
    """Sow x [B, T, d] into whichever collection of activations the caller asked for."""
    if module.is_mutable_collection(MEANS) and not module.is_initializing():
        weight = context.token_mask.astype(jnp.float32)[..., None]
        total = (x.astype(jnp.float32) * weight).sum(axis=1)
        count = jnp.maximum(weight.sum(axis=1), 1)
        module.sow(MEANS, name, total / count)
    if module.is_mutable_collection(TOKENS) and not module.is_initializing():
        module.sow(TOKENS, name, x)


class Site(nn.Module):
    """A frozen weight with whatever adapter its kind has in this layer."""

    kind: str
    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array, layer: LayerInputs, context: Context) -> Array:
        w = self.param("w", _normal, (x.shape[-1], self.features))
        b = self.param("b", nn.initializers.zeros, (self.features,)) if self.bias else None
        record(self, "in", x, context)
        key = None
        if layer.key is not None:
            key = jax.random.fold_in(layer.key, KINDS.index(self.kind))
        y = adapted(
            x,
            w.astype(x.dtype),
            layer.sites.get(self.kind),
            bias=None if b is None else b.astype(x.dtype),
            key=key,
        )
        record(self, "out", y, context)
        return y


def add_block_adapter(x: Array, y: Array, layer: LayerInputs) -> Array:
    """Add to a block's output y what the layer's block adapter, if any, makes of its input x."""
    key = None if layer.key is None else jax.random.fold_in(layer.key, len(KINDS))
    return beside_block(x, y, layer.sites.get(BLOCK), key=key)


class Linear(nn.Module):
    """x W (+ b) without an adapter."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = x @ self.param("w", _normal, (x.shape[-1], self.features)).astype(x.dtype)
        if self.bias:
            b = self.param("b", nn.initializers.zeros, (self.features,)).astype(x.dtype)
            y = y + b.reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class LayerNorm(nn.Module):
    """Layer norm in float32 with scale and bias."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        lead = (1,) * (x.ndim - 1) + (-1,)
        w = self.param("w", nn.initializers.ones, x.shape[-1:]).astype(jnp.float32).reshape(lead)
        b = self.param("b", nn.initializers.zeros, x.shape[-1:]).astype(jnp.float32).reshape(lead)
        y = x.astype(jnp.float32)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * w + b).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMS norm in float32; with `plus_one` the stored weight counts from 1 (Gemma)."""

    eps: float
    plus_one: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        w = self.param("w", start, x.shape[-1:]).astype(jnp.float32)
        w = (w + 1 if self.plus_one else w).reshape((1,) * (x.ndim - 1) + (-1,))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * w).astype(x.dtype)


class Embedding(nn.Module):
    """A table [V, d], looked up in."""

    size: int
    width: int

    @nn.compact
    def __call__(self, ids: Array, dtype) -> Array:  # i32[...] -> [..., d]
        return self.param("w", _normal, (self.size, self.width))[ids].astype(dtype)


def make_norm(config: ModelConfig, name: str) -> nn.Module:
    """Return the config's norm as a named submodule of the caller."""
    if config.norm == "layer":
        return LayerNorm(config.norm_eps, name=name)
    return RMSNorm(config.norm_eps, plus_one=config.norm == "rms_plus_one", name=name)


def activate(name: str, x: Array) -> Array:
    """Apply an activation by its name in `config.ACTIVATIONS`."""
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    return {"relu": jax.nn.relu, "silu": jax.nn.silu}[name](x)


class FeedForward(nn.Module):
    """down(act(up x)), or down(act(gate x) * up x) when gated."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, layer: LayerInputs, context: Context) -> Array:
        c = self.config
        y = Site("up", c.mlp_width, c.mlp_bias, name="up")(x, layer, context)
        if c.gated:
            gate = Site("gate", c.mlp_width, c.mlp_bias, name="gate")(x, layer, context)
            y = activate(c.activation, gate) * y
        else:
            y = activate(c.activation, y)
        return Site("down", c.width, c.mlp_bias, name="down")(y, layer, context)


def _policy(name: str) -> Callable[..., Any] | None:
    policies = jax.checkpoint_policies
    return {
        "full": None,
        "dots": policies.checkpoint_dots,
        "dots_no_batch": policies.checkpoint_dots_with_no_batch_dims,
    }[name]


def scan_layers(
    block: type[nn.Module],
    config: ModelConfig,
    x: Array,  # [B, T, d]
    layers: LayerInputs,  # leaves [Li, ...]
    context: Context,
) -> tuple[Array, Any]:
    """Run a block Li times over stacked parameters; call it inside a compact `__call__`."""
    if config.remat is not None:
        # Inside a scan the loop itself already keeps XLA from merging the two computations.
        block = nn.remat(block, policy=_policy(config.remat), prevent_cse=False)
    stack = nn.scan(
        block,
        variable_axes={"params": 0, MEANS: 0, TOKENS: 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=config.num_layers,
    )
    return stack(config, name="layers")(x, layers, context)

"""Self-attention for all families: masks, rotary positions, the product, and the cached form."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.models.config import ModelConfig
from h2tune_jax.models.layers import Context, LayerInputs, RMSNorm, Site
from h2tune_jax.types import Array


def causal_masks(
    positions: Array,  # i32[B, T], of the queries
    key_positions: Array,  # i32[B, S]
    key_mask: Array,  # bool[B, S]
    windows: tuple[int | None, ...],
) -> tuple[Array, ...]:  # each bool[B, 1, T, S]
    """Build the masks that the layers need: full attention, the window's, or both in this order.

    They compare positions, not array slots, so padding on either side, or a gap between a prompt and
    what was generated from it, leaves them right.
    """
    distance = positions[:, None, :, None] - key_positions[:, None, None, :]
    full = (distance >= 0) & key_mask[:, None, None, :]
    masks = {size: full if size is None else full & (distance < size) for size in set(windows)}
    return tuple(masks[size] for size in sorted(masks, key=lambda s: s or 0)) or (full,)


def rope_frequencies(config: ModelConfig) -> np.ndarray:  # f32[head_dim/2]
    """Return the rotary angle of each pair of head dimensions per position."""
    assert config.rope_theta is not None
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.float32(config.rope_theta) ** pairs
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / np.float32(scaling["factor"])
    # Llama 3: long wavelengths are stretched by the factor, short ones kept, those between blended.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - blend) * frequencies / scaling["factor"] + blend * frequencies).astype(np.float32)


def rope_angles(positions: Array, config: ModelConfig) -> tuple[Array, Array]:
    """Return cosines and sines f32[B, T, head_dim/2] for positions i32[B, T]."""
    frequencies = jnp.asarray(rope_frequencies(config))
    angles = positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:  # [B, T, heads, head_dim]
    """Rotate the pairs (i, i + head_dim/2) of every head, in float32."""
    cos, sin = rope[0][:, :, None, :], rope[1][:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend(
    q: Array,  # [B, T, N, H]
    k: Array,  # [B, S, K, H]
    v: Array,  # [B, S, K, H]
    mask: Array,  # bool[B, 1, T, S]
    config: ModelConfig,
) -> Array:  # [B, T, N, H]
    """Compute attention; through JAX's own function where it can be."""
    # For bfloat16 that function's products carry a preset whose derivative strict promotion refuses to
    # lower; the products below accumulate in float32 as they do. An implementation asked for by name
    # is used all the same.
    is_plain = q.dtype == jnp.float32 or config.attention is not None
    if config.attention_cap is None and is_plain:
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask, scale=config.attention_scale, implementation=config.attention
            )
    batch, steps, heads, dim = q.shape
    groups = k.shape[2]
    grouped = q.reshape(batch, steps, groups, heads // groups, dim)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    logits, cap = logits * config.attention_scale, config.attention_cap
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    logits = jnp.where(mask[:, :, None], logits, jnp.finfo(jnp.float32).min / 2)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(batch, steps, heads, dim)


class SelfAttention(nn.Module):
    """Attention with the sites q, k, v, o; -> (output [B, T, d], the cache written, or None)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Array, layer: LayerInputs, context: Context
    ) -> tuple[Array, tuple[Array, Array] | None]:
        c = self.config
        batch, steps, _ = x.shape

        def heads(kind: str, count: int) -> Array:
            site = Site(kind, count * c.head_dim, c.qkv_bias, name=kind)
            return site(x, layer, context).reshape(batch, steps, count, c.head_dim)

        q, k, v = heads("q", c.num_heads), heads("k", c.num_kv_heads), heads("v", c.num_kv_heads)
        if c.qk_norm:
            q, k = RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)
        if context.rope is not None:
            q, k = rotate(q, context.rope), rotate(k, context.rope)
        cache = layer.cache
        if cache is not None:
            assert context.slot is not None
            start = (0, context.slot, 0, 0)
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), start)
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), start)
            cache = (k, v)
        mask = context.masks[0]
        if layer.local is not None:
            mask = jnp.where(layer.local, context.masks[-1], mask)
        y = attend(q, k, v, mask, c).reshape(batch, steps, c.num_heads * c.head_dim)
        return Site("o", c.width, c.o_bias, name="o")(y, layer, context), cache

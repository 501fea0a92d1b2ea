"""The pre-norm block, and the decoder that Llama, Gemma and their kin share."""

import flax.linen as nn
import jax.numpy as jnp

from h2tune_jax.models.attention import SelfAttention
from h2tune_jax.models.config import ModelConfig
from h2tune_jax.models.family import Inputs
from h2tune_jax.models.layers import (
    Context,
    Embedding,
    FeedForward,
    LayerInputs,
    Linear,
    add_block_adapter,
    make_norm,
    record,
    scan_layers,
)
from h2tune_jax.models.tensors import Tensor, linear, norm
from h2tune_jax.types import Array


class PreNormBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); with `post_norms` each branch is normed again."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, layer: LayerInputs, context: Context):
        c, entered = self.config, x
        y = make_norm(c, "attention_norm")(x)
        y, cache = SelfAttention(c, name="attention")(y, layer, context)
        x = x + (make_norm(c, "attention_post_norm")(y) if c.post_norms else y)
        y = make_norm(c, "mlp_norm")(x)
        y = FeedForward(c, name="mlp")(y, layer, context)
        x = x + (make_norm(c, "mlp_post_norm")(y) if c.post_norms else y)
        x = add_block_adapter(entered, x, layer)
        record(self, "out", x, context)
        return x, cache


class Decoder(nn.Module):
    """Token ids -> hidden states [B, T, d] after the final norm; positions are rotary."""

    config: ModelConfig

    @nn.compact
    def __call__(self, inputs: Inputs, layers: LayerInputs, context: Context):
        c = self.config
        x = Embedding(c.vocab_size, c.width, name="tokens")(inputs.ids, jnp.dtype(c.dtype))
        if c.embed_scale is not None:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        x, caches = scan_layers(PreNormBlock, c, x, layers, context)
        x = make_norm(c, "final_norm")(x)
        if c.unembed == "own" and self.is_initializing():
            Linear(c.vocab_size, bias=False, name="unembed")(x)
        return x, caches


SITES = {
    "q": (("attention", "q"), "self_attn.q_proj"),
    "k": (("attention", "k"), "self_attn.k_proj"),
    "v": (("attention", "v"), "self_attn.v_proj"),
    "o": (("attention", "o"), "self_attn.o_proj"),
    "gate": (("mlp", "gate"), "mlp.gate_proj"),
    "up": (("mlp", "up"), "mlp.up_proj"),
    "down": (("mlp", "down"), "mlp.down_proj"),
}


def tensors(c: ModelConfig) -> list[Tensor]:
    """List where each parameter comes from."""
    layer, at = "layers.{}", ("layers",)
    bias = dict.fromkeys(("q", "k", "v"), c.qkv_bias) | {"o": c.o_bias}
    entries = [
        Tensor(("tokens", "w"), "embed_tokens.weight"),
        *norm(("final_norm",), "norm", bias=False),
        *norm((*at, "attention_norm"), f"{layer}.input_layernorm", bias=False),
    ]
    norms = {"mlp_norm": "post_attention_layernorm"}
    if c.post_norms:
        norms = {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    for ours, theirs in norms.items():
        entries += norm((*at, ours), f"{layer}.{theirs}", bias=False)
    if c.qk_norm:
        for name in ("q_norm", "k_norm"):
            entries += norm((*at, "attention", name), f"{layer}.self_attn.{name}", bias=False)
    for kind, (path, module) in SITES.items():
        entries += linear((*at, *path), f"{layer}.{module}", bias=bias.get(kind, c.mlp_bias))
    if c.unembed == "own":
        entries += linear(("unembed",), "lm_head", bias=False)
    return entries

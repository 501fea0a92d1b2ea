"""BERT, MiniLM and RoBERTa: post-norm encoders with learned positions."""

import flax.linen as nn
import jax.numpy as jnp

from h2tune_jax.models.attention import SelfAttention
from h2tune_jax.models.config import HfFields, ModelConfig
from h2tune_jax.models.family import Family, Inputs
from h2tune_jax.models.heads import HeadForm
from h2tune_jax.models.layers import (
    Context,
    Embedding,
    FeedForward,
    LayerInputs,
    LayerNorm,
    Linear,
    add_block_adapter,
    record,
    scan_layers,
)
from h2tune_jax.models.tensors import Tensor, linear, norm
from h2tune_jax.types import Array


class Block(nn.Module):
    """Attention and feed-forward, each added to its input and normed after."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, layer: LayerInputs, context: Context):
        c, entered = self.config, x
        y, cache = SelfAttention(c, name="attention")(x, layer, context)
        x = LayerNorm(c.norm_eps, name="attention_norm")(x + y)
        y = FeedForward(c, name="mlp")(x, layer, context)
        x = LayerNorm(c.norm_eps, name="mlp_norm")(x + y)
        x = add_block_adapter(entered, x, layer)
        record(self, "out", x, context)
        return x, cache


class Encoder(nn.Module):
    """Token ids -> hidden states [B, T, d]; with a pooler declared, `pool` applies it."""

    config: ModelConfig

    @nn.compact
    def __call__(self, inputs: Inputs, layers: LayerInputs, context: Context):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        # RoBERTa counts positions from pad_id + 1; so do its tables, which are that much longer.
        offset = c.pad_id + 1 if c.arch == "roberta" and c.pad_id is not None else 0
        x = Embedding(c.vocab_size, c.width, name="tokens")(inputs.ids, dtype)
        table = Embedding(c.max_positions + offset, c.width, name="positions")
        x = x + table(inputs.positions + offset, dtype)
        segments = jnp.zeros_like(inputs.ids) if inputs.segments is None else inputs.segments
        x = x + Embedding(c.type_vocab_size, c.width, name="segments")(segments, dtype)
        x = LayerNorm(c.norm_eps, name="embedding_norm")(x)
        x, caches = scan_layers(Block, c, x, layers, context)
        if c.pooler and self.is_initializing():
            Linear(c.width, name="pooler")(x)
        return x, caches


def config(hf: HfFields, **choices) -> ModelConfig:
    """Read a BERT or RoBERTa config."""
    hf.refuse("position_embedding_type", "absolute")
    hf.refuse("is_decoder", False)
    hf.refuse("add_cross_attention", False)
    arch = hf.take("model_type", str)
    width, heads = hf.take("hidden_size", int), hf.take("num_attention_heads", int)
    pad_id = hf.take("pad_token_id", int, 1 if arch == "roberta" else 0)
    positions = hf.take("max_position_embeddings", int, 512)
    return ModelConfig(
        arch=arch,
        width=width,
        num_layers=hf.take("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=hf.take("intermediate_size", int),
        activation=hf.activation("hidden_act", "gelu"),
        norm_eps=hf.take("layer_norm_eps", float, 1e-12),
        vocab_size=hf.take("vocab_size", int),
        max_positions=positions - (pad_id + 1 if arch == "roberta" else 0),
        type_vocab_size=hf.take("type_vocab_size", int, 2),
        pad_id=pad_id,
        pooler=arch == "bert" and choices.get("pooling", "native") == "native",
        unembed="none",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        attention_scale=(width // heads) ** -0.5,
        source=hf.json(),
        **choices,
    )


def tensors(c: ModelConfig) -> list[Tensor]:
    """List where each parameter comes from."""
    layer, at = "encoder.layer.{}", ("layers",)
    entries = [
        Tensor(("tokens", "w"), "embeddings.word_embeddings.weight"),
        Tensor(("positions", "w"), "embeddings.position_embeddings.weight"),
        Tensor(("segments", "w"), "embeddings.token_type_embeddings.weight"),
        *norm(("embedding_norm",), "embeddings.LayerNorm", bias=True),
        *norm((*at, "attention_norm"), f"{layer}.attention.output.LayerNorm", bias=True),
        *norm((*at, "mlp_norm"), f"{layer}.output.LayerNorm", bias=True),
    ]
    for path, module in SITES.values():
        entries += linear((*at, *path), f"{layer}.{module}", bias=True)
    if c.pooler:
        entries += linear(("pooler",), "pooler.dense", bias=True)
    return entries


SITES = {
    "q": (("attention", "q"), "attention.self.query"),
    "k": (("attention", "k"), "attention.self.key"),
    "v": (("attention", "v"), "attention.self.value"),
    "o": (("attention", "o"), "attention.output.dense"),
    "up": (("mlp", "up"), "intermediate.dense"),
    "down": (("mlp", "down"), "output.dense"),
}

_IGNORED = (
    r"embeddings\.position_ids",
    r"(cls|classifier|lm_head|qa_outputs|pooler)\..*",
)

BERT = Family(
    config_fn=config,
    network=Encoder,
    tensors_fn=tensors,
    prefix="bert",
    layer_module="encoder.layer.{}",
    sites=SITES,
    head=HeadForm((("out", "classifier"),), bias=True, pool="first"),
    causal=False,
    causal_class=None,
    classifier_class="BertForSequenceClassification",
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    ignored=_IGNORED,
)

ROBERTA = BERT._replace(
    prefix="roberta",
    head=HeadForm(
        (("dense", "classifier.dense"), ("out", "classifier.out_proj")), bias=True, pool="first"
    ),
    classifier_class="RobertaForSequenceClassification",
)

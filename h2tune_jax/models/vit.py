"""ViT: an image as a sequence of patches behind a class token."""

import flax.linen as nn
import jax.numpy as jnp

from h2tune_jax.models.config import HfFields, ModelConfig
from h2tune_jax.models.decoder import PreNormBlock
from h2tune_jax.models.family import Family, Inputs
from h2tune_jax.models.heads import HeadForm
from h2tune_jax.models.layers import Context, LayerInputs, Linear, make_norm, scan_layers
from h2tune_jax.models.tensors import Tensor, linear, norm
from h2tune_jax.types import Array


def patches(images: Array, size: int) -> Array:  # [B, c, h, w] -> [B, patches, c*size*size]
    """Cut images into patches, row by row, each flattened as (channel, row, column)."""
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // size, size, width // size, size)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)


class Vit(nn.Module):
    """Images -> hidden states [B, 1 + patches, d] after the final norm."""

    config: ModelConfig

    @nn.compact
    def __call__(self, inputs: Inputs, layers: LayerInputs, context: Context):
        c = self.config
        x = patches(inputs.ids.astype(c.dtype), c.patch_size)
        x = Linear(c.width, name="patches")(x)
        init = nn.initializers.normal(0.02)
        first = self.param("cls", init, (c.width,)).astype(x.dtype)
        first = jnp.broadcast_to(first[None, None, :], (x.shape[0], 1, c.width))
        x = jnp.concatenate([first, x], axis=1)
        places = self.param("positions", init, (c.max_positions, c.width))
        x = x + places.astype(x.dtype)[None]
        x, caches = scan_layers(PreNormBlock, c, x, layers, context)
        return make_norm(c, "final_norm")(x), caches


def config(hf: HfFields, **choices) -> ModelConfig:
    """Read a ViT config."""
    width, heads = hf.take("hidden_size", int), hf.take("num_attention_heads", int)
    image, patch = hf.take("image_size", int, 224), hf.take("patch_size", int, 16)
    return ModelConfig(
        arch="vit",
        width=width,
        num_layers=hf.take("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=hf.take("intermediate_size", int),
        activation=hf.activation("hidden_act", "gelu"),
        norm_eps=hf.take("layer_norm_eps", float, 1e-12),
        vocab_size=0,
        max_positions=1 + (image // patch) ** 2,
        unembed="none",
        qkv_bias=hf.take("qkv_bias", bool, True),
        o_bias=True,
        mlp_bias=True,
        attention_scale=(width // heads) ** -0.5,
        image_size=image,
        patch_size=patch,
        channels=hf.take("num_channels", int, 3),
        source=hf.json(),
        **choices,
    )


SITES = {
    "q": (("attention", "q"), "attention.q_proj"),
    "k": (("attention", "k"), "attention.k_proj"),
    "v": (("attention", "v"), "attention.v_proj"),
    "o": (("attention", "o"), "attention.o_proj"),
    "up": (("mlp", "up"), "mlp.fc1"),
    "down": (("mlp", "down"), "mlp.fc2"),
}

_FILE_NAMES = {
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
"""Files kept the names of transformers 4; `SITES` has its modules' names since 5, which PEFT goes by."""


def tensors(c: ModelConfig) -> list[Tensor]:
    """List where each parameter comes from."""
    layer, at = "encoder.layer.{}", ("layers",)
    entries = [
        Tensor(("cls",), "embeddings.cls_token", "lead"),
        Tensor(("positions",), "embeddings.position_embeddings", "lead"),
        Tensor(("patches", "w"), "embeddings.patch_embeddings.projection.weight", "patch"),
        Tensor(("patches", "b"), "embeddings.patch_embeddings.projection.bias"),
        *norm(("final_norm",), "layernorm", bias=True),
        *norm((*at, "attention_norm"), f"{layer}.layernorm_before", bias=True),
        *norm((*at, "mlp_norm"), f"{layer}.layernorm_after", bias=True),
    ]
    for kind, (path, _) in SITES.items():
        bias = c.qkv_bias or kind not in "qkv"
        entries += linear((*at, *path), f"{layer}.{_FILE_NAMES[kind]}", bias=bias)
    return entries


VIT = Family(
    config_fn=config,
    network=Vit,
    tensors_fn=tensors,
    prefix="vit",
    layer_module="layers.{}",
    sites=SITES,
    head=HeadForm((("out", "classifier"),), bias=True, pool="first"),
    causal=False,
    causal_class=None,
    classifier_class="ViTForImageClassification",
    renamed=(
        *(
            (rf"^layers\.(\d+)\.{SITES[kind][1]}\.", rf"encoder.layer.\1.{name}.")
            for kind, name in _FILE_NAMES.items()
        ),
        (r"^layers\.(\d+)\.layernorm", r"encoder.layer.\1.layernorm"),
    ),
    ignored=(r"(classifier|pooler)\..*", r"embeddings\.mask_token"),
)

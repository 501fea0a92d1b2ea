"""GPT-2: a pre-norm decoder with layer norms and learned positions; its q, k, v are separate sites here."""

import flax.linen as nn
import jax.numpy as jnp

from h2tune_jax.models.config import HfFields, ModelConfig
from h2tune_jax.models.decoder import PreNormBlock
from h2tune_jax.models.family import Family, Inputs
from h2tune_jax.models.heads import HeadForm
from h2tune_jax.models.layers import Context, Embedding, LayerInputs, Linear, make_norm, scan_layers
from h2tune_jax.models.tensors import Tensor, linear, norm


class Gpt2(nn.Module):
    """Token ids -> hidden states [B, T, d] after the final norm."""

    config: ModelConfig

    @nn.compact
    def __call__(self, inputs: Inputs, layers: LayerInputs, context: Context):
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = Embedding(c.vocab_size, c.width, name="tokens")(inputs.ids, dtype)
        x = x + Embedding(c.max_positions, c.width, name="positions")(inputs.positions, dtype)
        x, caches = scan_layers(PreNormBlock, c, x, layers, context)
        x = make_norm(c, "final_norm")(x)
        if c.unembed == "own" and self.is_initializing():
            Linear(c.vocab_size, bias=False, name="unembed")(x)
        return x, caches


def config(hf: HfFields, **choices) -> ModelConfig:
    """Read a GPT-2 config."""
    hf.refuse("scale_attn_by_inverse_layer_idx", False)
    hf.refuse("add_cross_attention", False)
    width, heads = hf.take("n_embd", int), hf.take("n_head", int)
    scaled = hf.take("scale_attn_weights", bool, True)
    return ModelConfig(
        arch="gpt2",
        width=width,
        num_layers=hf.take("n_layer", int),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=hf.take("n_inner", int, 4 * width),
        activation=hf.activation("activation_function", "gelu_new"),
        norm_eps=hf.take("layer_norm_epsilon", float, 1e-5),
        vocab_size=hf.take("vocab_size", int),
        max_positions=hf.take("n_positions", int, 1024),
        pad_id=hf.take("pad_token_id", int, None),
        unembed="tied" if hf.take("tie_word_embeddings", bool, True) else "own",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        attention_scale=(width // heads) ** -0.5 if scaled else 1.0,
        source=hf.json(),
        **choices,
    )


SITES = {
    "q": (("attention", "q"), "attn.c_attn"),
    "k": (("attention", "k"), "attn.c_attn"),
    "v": (("attention", "v"), "attn.c_attn"),
    "o": (("attention", "o"), "attn.c_proj"),
    "up": (("mlp", "up"), "mlp.c_fc"),
    "down": (("mlp", "down"), "mlp.c_proj"),
}


def tensors(c: ModelConfig) -> list[Tensor]:
    """List where each parameter comes from; GPT-2 keeps weights as [in, out], so as we do."""
    layer, at = "h.{}", ("layers",)
    entries = [
        Tensor(("tokens", "w"), "wte.weight"),
        Tensor(("positions", "w"), "wpe.weight"),
        *norm(("final_norm",), "ln_f", bias=True),
        *norm((*at, "attention_norm"), f"{layer}.ln_1", bias=True),
        *norm((*at, "mlp_norm"), f"{layer}.ln_2", bias=True),
    ]
    for kind, (path, module) in SITES.items():
        part = ("qkv".index(kind), 3) if kind in "qkv" else None
        for leaf, name in (("w", "weight"), ("b", "bias")):
            entries.append(Tensor((*at, *path, leaf), f"{layer}.{module}.{name}", part=part))
    if c.unembed == "own":
        entries += linear(("unembed",), "lm_head", bias=False)
    return entries


GPT2 = Family(
    config_fn=config,
    network=Gpt2,
    tensors_fn=tensors,
    prefix="transformer",
    layer_module="h.{}",
    sites=SITES,
    head=HeadForm((("out", "score"),), bias=False, pool="last"),
    causal=True,
    causal_class="GPT2LMHeadModel",
    classifier_class="GPT2ForSequenceClassification",
    ignored=(r"(score|lm_head|qa_outputs)\..*", r"h\.\d+\.attn\.(masked_)?bias"),
)

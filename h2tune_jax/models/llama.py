"""Llama 2 and 3, SmolLM and SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3."""

from h2tune_jax.models import decoder
from h2tune_jax.models.config import HfFields, ModelConfig
from h2tune_jax.models.family import Family
from h2tune_jax.models.heads import HeadForm


def config(hf: HfFields, **choices) -> ModelConfig:
    """Read the config of one of this family's architectures."""
    arch = hf.take("model_type", str)
    width, heads = hf.take("hidden_size", int), hf.take("num_attention_heads", int)
    head_dim = hf.take("head_dim", int, 128 if arch == "qwen3" else width // heads)
    attention_bias = hf.take("attention_bias", bool, False)
    if arch == "mistral":
        window = hf.optional("sliding_window", int, 4096)
        windows = hf.windows(lambda i: window is not None, missing=window)
    elif hf.take("use_sliding_window", bool, False):
        first = hf.take("max_window_layers", int, 28)
        windows = hf.windows(lambda i: i >= first, missing=4096)
    else:
        windows = ()
    return ModelConfig(
        arch=arch,
        width=width,
        num_layers=hf.take("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=hf.take("num_key_value_heads", int, heads),
        head_dim=head_dim,
        mlp_width=hf.take("intermediate_size", int),
        gated=True,
        activation=hf.activation("hidden_act", "silu"),
        norm="rms",
        norm_eps=hf.take("rms_norm_eps", float, 1e-6),
        vocab_size=hf.take("vocab_size", int),
        max_positions=hf.take("max_position_embeddings", int),
        pad_id=hf.take("pad_token_id", int, None),
        unembed="tied" if hf.take("tie_word_embeddings", bool, False) else "own",
        qkv_bias=attention_bias or arch == "qwen2",
        o_bias=attention_bias,
        mlp_bias=hf.take("mlp_bias", bool, False),
        qk_norm=arch == "qwen3",
        windows=windows,
        attention_scale=head_dim**-0.5,
        source=hf.json(),
        **hf.rope(),
        **choices,
    )


LLAMA = Family(
    config_fn=config,
    network=decoder.Decoder,
    tensors_fn=decoder.tensors,
    prefix="model",
    layer_module="layers.{}",
    sites=decoder.SITES,
    head=HeadForm((("out", "score"),), bias=False, pool="last"),
    causal=True,
    causal_class="LlamaForCausalLM",
    classifier_class="LlamaForSequenceClassification",
    ignored=(r"(score|lm_head|qa_outputs)\..*", r".*rotary_emb\.inv_freq"),
)

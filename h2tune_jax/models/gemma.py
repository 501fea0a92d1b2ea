"""Gemma 1 and 2: norms that count from 1, scaled embeddings; in 2 soft-capping and windows as well."""

from h2tune_jax.models.config import HfFields, ModelConfig
from h2tune_jax.models.family import Family
from h2tune_jax.models.llama import LLAMA


def config(hf: HfFields, **choices) -> ModelConfig:
    """Read a Gemma or Gemma 2 config."""
    hf.refuse("use_bidirectional_attention", False)
    arch = hf.take("model_type", str)
    second = arch == "gemma2"
    width, heads = hf.take("hidden_size", int), hf.take("num_attention_heads", int)
    head_dim = hf.take("head_dim", int, 256)
    act = hf.activation("hidden_activation" if second else "hidden_act", "gelu_pytorch_tanh")
    # The first release's "gelu" was a slip of the pen for the tanh form; transformers reads it so.
    act = "gelu_tanh" if act == "gelu" and not second else act
    bias = hf.take("attention_bias", bool, False)
    scale = hf.take("query_pre_attn_scalar", float, 256.0) if second else float(head_dim)
    return ModelConfig(
        arch=arch,
        width=width,
        num_layers=hf.take("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=hf.take("num_key_value_heads", int, heads),
        head_dim=head_dim,
        mlp_width=hf.take("intermediate_size", int),
        gated=True,
        activation=act,
        norm="rms_plus_one",
        norm_eps=hf.take("rms_norm_eps", float, 1e-6),
        post_norms=second,
        embed_scale=width**0.5,
        vocab_size=hf.take("vocab_size", int),
        max_positions=hf.take("max_position_embeddings", int, 8192),
        pad_id=hf.take("pad_token_id", int, 0),
        unembed="tied" if hf.take("tie_word_embeddings", bool, True) else "own",
        qkv_bias=bias,
        o_bias=bias,
        windows=hf.windows(lambda i: i % 2 == 0, missing=4096) if second else (),
        attention_scale=scale**-0.5,
        attention_cap=hf.optional("attn_logit_softcapping", float, 50.0) if second else None,
        logit_cap=hf.optional("final_logit_softcapping", float, 30.0) if second else None,
        source=hf.json(),
        **hf.rope(),
        **choices,
    )


GEMMA: Family = LLAMA._replace(
    config_fn=config,
    causal_class="GemmaForCausalLM",
    classifier_class="GemmaForSequenceClassification",
)

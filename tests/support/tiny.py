"""Small configs of every family, without torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.models import build, config_from_hf

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 32,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
CONFIGS = {
    "bert": {**_TEXT, "model_type": "bert"},
    "roberta": {**_TEXT, "model_type": "roberta"},
    "llama": {
        **_GROUPED,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": 10000.0,
    },
    "mistral": {**_GROUPED, "model_type": "mistral", "sliding_window": 3},
    "qwen2": {
        **_GROUPED,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
    "qwen3": {**_GROUPED, "model_type": "qwen3", "head_dim": 12},
    "gemma": {**_GROUPED, "model_type": "gemma", "head_dim": 12},
    "gemma2": {
        **_GROUPED,
        "model_type": "gemma2",
        "head_dim": 12,
        "sliding_window": 3,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 60,
        "n_positions": 32,
    },
    "vit": {
        "model_type": "vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 12,
        "patch_size": 4,
    },
}


@functools.cache
def tiny_base(arch, **choices):
    """(model, base) with random weights well above their usual start, norms round 1."""
    model = build(config_from_hf(CONFIGS[arch], **choices))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        scales = "norm" in str(path[-2:]) and path[-1].key == "w"
        start = 1.0 if scales and model.config.norm != "rms_plus_one" else 0.0
        return jnp.asarray(start + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(model.init_fn, jax.random.key(0))
    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def classify_fn(arch, **choices):
    """The compiled classifier of such a model, compiled once a test run and shape."""
    return jax.jit(tiny_base(arch, **choices)[0].classify_fn)

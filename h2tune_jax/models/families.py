"""The families by architecture, named as `model_type` is in a Hugging Face config."""

import json
from collections.abc import Mapping
from typing import Any

from h2tune_jax.models.bert import BERT, ROBERTA
from h2tune_jax.models.config import HfFields, ModelConfig
from h2tune_jax.models.family import Family
from h2tune_jax.models.gemma import GEMMA
from h2tune_jax.models.gpt2 import GPT2
from h2tune_jax.models.llama import LLAMA
from h2tune_jax.models.vit import VIT
from h2tune_jax.types import FederationError, near_match

FAMILIES: dict[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "llama": LLAMA,
    "mistral": LLAMA._replace(
        causal_class="MistralForCausalLM", classifier_class="MistralForSequenceClassification"
    ),
    "qwen2": LLAMA._replace(
        causal_class="Qwen2ForCausalLM", classifier_class="Qwen2ForSequenceClassification"
    ),
    "qwen3": LLAMA._replace(
        causal_class="Qwen3ForCausalLM", classifier_class="Qwen3ForSequenceClassification"
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA._replace(
        causal_class="Gemma2ForCausalLM", classifier_class="Gemma2ForSequenceClassification"
    ),
    "gpt2": GPT2,
    "vit": VIT,
}


def family_of(config: ModelConfig) -> Family:
    """Return the family that a config belongs to."""
    return _lookup(config.arch)


def config_from_hf(fields: Mapping[str, Any], **choices: Any) -> ModelConfig:
    """Turn a Hugging Face config dict into a `ModelConfig`.

    `choices` are ours: dtype, remat, pooling, attention.
    """
    hf = HfFields(fields)
    family = _lookup(hf.take("model_type", str))
    hf.refuse("quantization_config")
    return family.config_fn(hf, **choices)


def _lookup(arch: str) -> Family:
    if arch not in FAMILIES:
        raise FederationError(f"architecture {arch!r} is unsupported; {near_match(arch, FAMILIES)}")
    return FAMILIES[arch]


def hf_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the Hugging Face config dict that a config was read from."""
    return json.loads(config.source)

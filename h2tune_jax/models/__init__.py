"""Foundation models in Flax: families, import, generation, pruning, export."""

from h2tune_jax.models.config import ModelConfig
from h2tune_jax.models.export import export_merged, export_peft
from h2tune_jax.models.families import FAMILIES, config_from_hf
from h2tune_jax.models.generate import Generated, generate
from h2tune_jax.models.load_gguf import load_gguf
from h2tune_jax.models.load_hf import load_hf, load_tokenizer
from h2tune_jax.models.model import Activations, Cache, Model, build
from h2tune_jax.models.prune import prune_depth
from h2tune_jax.models.tokenizer_gguf import load_gguf_tokenizer

__all__ = [
    "FAMILIES",
    "Activations",
    "Cache",
    "Generated",
    "Model",
    "ModelConfig",
    "build",
    "config_from_hf",
    "export_merged",
    "export_peft",
    "generate",
    "load_gguf",
    "load_gguf_tokenizer",
    "load_hf",
    "load_tokenizer",
    "prune_depth",
]

"""From a group's `model` table to a model, its frozen base and its tokenizer."""

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import jax

from h2tune_jax import models
from h2tune_jax.models.families import config_from_hf
from h2tune_jax.models.load_gguf import read_config as read_gguf_config
from h2tune_jax.models.load_hf import read_config as read_hf_config
from h2tune_jax.models.model import Model, base_shapes, build
from h2tune_jax.run.byte_tokenizer import ByteTokenizer
from h2tune_jax.run.settings import ModelConfig, ShapeConfig
from h2tune_jax.tasks import assets
from h2tune_jax.types import FederationError, PyTree

ASSETS = {"minilm": "", "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}
"""Models that are fetched by name, and which file of theirs is read ("" for the folder)."""

_BASE_SEED = 0  # a random base stands in for a pretrained one: it is the same in every run


class Loaded(NamedTuple):
    """One group's model."""

    model: Model
    base: PyTree  # arrays, or their shapes
    tokenizer: Any
    origin: str  # where the weights came from, however the config spells it


class ModelSources:
    """Loads every source once and prunes it once in every way, however many groups share the result."""

    def __init__(self, *, weights: bool = True):
        """With `weights=False` bases are `jax.ShapeDtypeStruct`s, and no weight is read."""
        self.weights = weights
        self._loaded: dict[ModelConfig, Loaded] = {}
        self._tokenizers: dict[str, Any] = {}

    def load(self, config: ModelConfig) -> Loaded:
        """Load a model and prune it.

        Groups with the same model share all its arrays (or shapes of arrays), and those that prune one
        model in several ways all but its layers.
        """
        if config not in self._loaded:
            self._loaded[config] = self._load(config)
        return self._loaded[config]

    def _load(self, config: ModelConfig) -> Loaded:
        if config.prune is None:
            tokenizer = self._tokenizer(config)
            model, base = _load_whole(config, tokenizer, self.weights)
            return Loaded(model, base, tokenizer, _origin(config.source))
        whole = self.load(config.model_copy(update={"prune": None}))
        chosen = config.prune.model_dump()
        if self.weights:
            model, base = models.prune_depth(whole.model, whole.base, **chosen)
            return whole._replace(model=model, base=base)
        pruned: list[Model] = []

        def prune(base: PyTree) -> PyTree:
            small, base = models.prune_depth(whole.model, base, **chosen)
            pruned.append(small)
            return base

        layers = jax.eval_shape(prune, whole.base)["layers"]
        return whole._replace(model=pruned[0], base={**whole.base, "layers": layers})

    def _tokenizer(self, config: ModelConfig) -> Any:
        source = config.tokenizer or config.source
        if source == "random":  # images
            return None
        if source not in self._tokenizers:
            self._tokenizers[source] = (
                ByteTokenizer() if source == "bytes" else _load_tokenizer(_locate(source))
            )
        return self._tokenizers[source]


def _locate(source: str) -> str:
    """Return the folder, file or hub id that a source names, fetching what can be fetched."""
    if source in ASSETS:
        return str(assets.fetch(source) / ASSETS[source])
    return source.removeprefix("hub:")


def _origin(source: str) -> str:
    """Name the weights behind a source: the same for all spellings of one folder or file."""
    place = _locate(source)
    is_local = source != "random" and os.path.exists(place)
    return os.path.realpath(place) if is_local else source


def _need_gguf(place: str) -> None:
    if place.endswith(".gguf") and importlib.util.find_spec("gguf") is None:
        raise FederationError(
            f"{place}: GGUF files cannot be read here; it needs the extra `data`: "
            "pip install 'h2tune-jax[data]'"
        )


def _load_tokenizer(place: str) -> Any:
    _need_gguf(place)
    return models.load_tokenizer(place)


def _load_whole(config: ModelConfig, tokenizer: Any, weights: bool) -> tuple[Model, PyTree]:
    choices = {
        "dtype": config.dtype,
        "pooling": config.pools,
        "remat": config.remat,
        "attention": config.attention,
    }
    if config.source == "random":
        assert config.shape is not None  # the settings say so
        model = build(config_from_hf(_hf_fields(config.shape, tokenizer), **choices))
        if not weights:
            return model, base_shapes(model.config)
        base = jax.jit(model.init_fn)(jax.random.key(_BASE_SEED))
        return model, jax.tree.map(lambda leaf: leaf.astype(config.dtype), base)
    place = _locate(config.source)
    _need_gguf(place)
    is_gguf = place.endswith(".gguf")
    if weights:
        return (models.load_gguf if is_gguf else models.load_hf)(place, **choices)
    model = build((read_gguf_config if is_gguf else read_hf_config)(place, **choices))
    dtype = jax.numpy.dtype(config.dtype)
    shapes = base_shapes(model.config)
    return model, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def _hf_fields(shape: ShapeConfig, tokenizer: Any) -> dict[str, Any]:
    """Write sizes as the Hugging Face config of a family, in its own names."""
    if shape.family == "gpt2":
        return {
            "model_type": "gpt2",
            "n_embd": shape.width,
            "n_layer": shape.layers,
            "n_head": shape.heads,
            "n_inner": shape.mlp_width,
            "n_positions": shape.max_positions,
            "vocab_size": _vocab_size(tokenizer),
        }
    fields: dict[str, Any] = {
        "model_type": shape.family,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp_width,
    }
    if shape.family == "vit":
        images = {"image_size": shape.image_size, "patch_size": shape.patch_size}
        return fields | images | {"num_channels": shape.channels}
    fields |= {"vocab_size": _vocab_size(tokenizer), "max_position_embeddings": shape.max_positions}
    if shape.kv_heads is not None:
        fields["num_key_value_heads"] = shape.kv_heads
    if shape.family not in ("bert", "roberta"):
        fields["head_dim"] = shape.width // shape.heads
    if (pad := getattr(tokenizer, "pad_token_id", None)) is not None:
        fields["pad_token_id"] = pad
    return fields


def _vocab_size(tokenizer: Any) -> int:
    # The added tokens of a Hugging Face tokenizer are beyond its `vocab_size`.
    return tokenizer.vocab_size if isinstance(tokenizer, ByteTokenizer) else len(tokenizer)


@functools.lru_cache(maxsize=256)
def head_of(model: Model, num_labels: int) -> Any:
    """Return the start of a task head: one function for equal models, so that specs compare equal."""
    return model.init_head_fn(num_labels)

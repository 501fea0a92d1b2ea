"""What a family file has to say for itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

from h2tune_jax.models.config import ModelConfig
from h2tune_jax.models.heads import HeadForm
from h2tune_jax.models.tensors import Tensor
from h2tune_jax.types import Array


class Inputs(NamedTuple):
    """What a network is given, made from the caller's mapping of arrays."""

    ids: Array  # i32[B, T]; for images f32[B, channels, height, width]
    positions: Array  # i32[B, T]
    segments: Array | None  # i32[B, T]


class Family(NamedTuple):
    """One family: its network, and how Hugging Face names it.

    Attributes:
      config_fn: (HfFields, **choices) -> ModelConfig.
      network: module class; called with (inputs, layers, context) -> (hidden [B, T, d], caches).
      tensors_fn: config -> every leaf of the base and its tensor.
      prefix: of the backbone's tensors in files that hold a task head as well.
      layer_module: the module of a layer in the torch model, below the prefix.
      sites: kind -> (path of its parameters in a layer, its torch module in a layer).
      head: the classifier's form.
      causal: whether tokens see only what is before them.
      causal_class, classifier_class: the Hugging Face classes of merged exports.
      renamed: (pattern, replacement) pairs for old spellings of tensor names.
      ignored: patterns of tensors, without prefix, that belong to other tasks' heads.
    """

    config_fn: Callable[..., ModelConfig]
    network: Any
    tensors_fn: Callable[[ModelConfig], list[Tensor]]
    prefix: str
    layer_module: str
    sites: dict[str, tuple[tuple[str, ...], str]]
    head: HeadForm
    causal: bool
    causal_class: str | None
    classifier_class: str
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

"""Depth pruning: a smaller model of the same family, for clients that cannot afford all its layers."""

import dataclasses
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from h2tune_jax.models.config import ModelConfig
from h2tune_jax.models.model import Model, build
from h2tune_jax.types import FederationError, PyTree


def prune_depth(
    model: Model,
    base: PyTree,
    *,
    every: int | None = None,
    first: int | None = None,
    layers: Sequence[int] | None = None,
) -> tuple[Model, PyTree]:
    """Keep some of a model's layers; embeddings, final norm and widths stay.

    Args:
      model, base: the whole model; its base is not changed.
      every: keep layers 0, n, 2n, ...
      first: keep the first n.
      layers: keep exactly these, in this order.

    Returns:
      (model, base) with that many layers. Exactly one of the three options is given. An adapter
      trained on it fits the pruned base only: `export_merged` without sites writes that.
    """
    kept = _kept(model.config.num_layers, every=every, first=first, layers=layers)
    if kept == tuple(range(model.config.num_layers)):
        return model, base
    index = jnp.asarray(kept, jnp.int32)
    pruned = {**base, "layers": jax.tree.map(lambda leaf: leaf[index], base["layers"])}
    return build(prune_config(model.config, kept)), pruned


def prune_config(config: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """Return the config of the model that keeps these layers."""
    source = json.loads(config.source)
    for name in ("num_hidden_layers", "n_layer"):
        if name in source:
            source[name] = len(kept)
    windows = tuple(config.windows[i] for i in kept) if config.windows else ()
    if source.get("layer_types") or len(set(config.windows)) > 1:
        # Which layers are windowed no longer follows from the family's rule.
        source["layer_types"] = [
            "full_attention" if window is None else "sliding_attention"
            for window in windows or (None,) * len(kept)
        ]
    return dataclasses.replace(
        config,
        num_layers=len(kept),
        windows=windows,
        kept=tuple(config.kept[i] if config.kept else i for i in kept),
        kept_of=config.kept_of or config.num_layers,
        source=json.dumps(source, sort_keys=True),
    )


def _kept(
    count: int, *, every: int | None, first: int | None, layers: Sequence[int] | None
) -> tuple[int, ...]:
    if sum(option is not None for option in (every, first, layers)) != 1:
        raise FederationError("prune_depth: give exactly one of every, first and layers")
    if every is not None:
        if every < 1:
            raise FederationError(f"prune_depth: every must be at least 1, got {every}")
        return tuple(range(0, count, every))
    if first is not None:
        if not 1 <= first <= count:
            raise FederationError(f"prune_depth: first must lie in 1 ... {count}, got {first}")
        return tuple(range(first))
    assert layers is not None
    kept = tuple(int(i) for i in layers)
    if not kept or min(kept) < 0 or max(kept) >= count:
        raise FederationError(f"prune_depth: layers must lie in 0 ... {count - 1}, got {kept}")
    return kept

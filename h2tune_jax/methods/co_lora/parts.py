"""A Co-LoRA client's parts: their start, which of them travel, and the adapters that they make."""

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.adapters.gated import Branch, GatedSite
from h2tune_jax.methods.co_lora.align import aligned_layers
from h2tune_jax.methods.co_lora.state import Parts
from h2tune_jax.methods.start import init_factors
from h2tune_jax.types import Adapters, Array, CohortSpec


def start_factors(spec: CohortSpec, key: Array, num_blocks: int) -> Parts:
    """Draw the plain LoRA of the layers that are not aligned, the same for all of an architecture."""
    others = other_layers(spec, num_blocks)
    if not others.size:
        return {"a": {}, "b": {}}
    return jax.tree.map(lambda leaf: leaf[others], init_factors(spec, key))


def other_layers(spec: CohortSpec, num_blocks: int) -> np.ndarray:  # i64[Li - blocks]
    """Return the layers that are not aligned."""
    layers = spec.model.num_layers
    return np.setdiff1d(np.arange(layers), aligned_layers(layers, num_blocks))


def start_parts(spec: CohortSpec, frozen: Parts) -> Parts:
    """Return what a client's local branch starts from: P and Q zero, the other layers as drawn."""
    blocks = {kind: frozen["a"][kind].shape[0] for kind in spec.kinds}
    zeros = lambda *shape: {
        kind: jnp.zeros((count, *shape), spec.dtype) for kind, count in blocks.items()
    }
    return {"p": zeros(spec.rank, spec.rank), "q": zeros(spec.rank), **frozen["start"]}


def travelling(params: Parts) -> Parts:
    """Pick what a client sends."""
    return {name: params[name] for name in ("p", "q", "a", "b")}


def assemble(spec: CohortSpec, frozen: Parts, params: Parts, heard: Parts) -> Adapters:
    """Put both branches of every layer together."""
    sites = {}
    for kind in spec.kinds:
        blocks = frozen["a"][kind].shape[0]
        aligned = aligned_layers(spec.model.num_layers, blocks)
        others = other_layers(spec, blocks)
        order = np.argsort(np.concatenate([aligned, others]))
        eye = jnp.broadcast_to(
            jnp.eye(spec.rank, dtype=spec.dtype), (len(others), *(spec.rank,) * 2)
        )
        none = jnp.zeros((len(others), spec.rank), spec.dtype)

        def all_layers(at_aligned: Array, at_others: Array | None, order=order) -> Array:
            if at_others is None or at_others.shape[0] == 0:
                return at_aligned
            return jnp.concatenate([at_aligned, at_others])[order]

        branches = [
            Branch(
                a=all_layers(frozen["a"][kind], parts["a"].get(kind)),
                p=all_layers(parts["p"][kind], eye),
                q=all_layers(parts["q"][kind], none),
                b=all_layers(frozen["b"][kind], parts["b"].get(kind)),
            )
            for parts in (params, heard)
        ]
        sites[kind] = GatedSite(
            local=branches[0],
            shared=branches[1],
            gate=params["gate"][kind],
            scale=spec.scale,
            dropout=spec.dropout,
        )
    return Adapters(sites, params["head"])

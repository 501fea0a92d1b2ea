"""A model as a tuple of pure functions of its frozen base, built from a config.

`inputs` is a mapping of arrays everywhere:

    input_ids       i32[B, T]       token ids
    attention_mask  [B, T]          1 for tokens, 0 for padding; all ones if absent
    token_type_ids  i32[B, T]       segments (BERT); zeros if absent
    position_ids    i32[B, T]       counted from the attention mask if absent
    pixel_values    f32[B, c, h, w] for images, instead of all the above

Other entries are not looked at, so a batch may carry its labels along.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.adapters.block import BLOCK
from h2tune_jax.models.attention import causal_masks, rope_angles
from h2tune_jax.models.config import ModelConfig
from h2tune_jax.models.families import family_of
from h2tune_jax.models.family import Inputs
from h2tune_jax.models.heads import apply_head, init_head, pool
from h2tune_jax.models.layers import MEANS, TOKENS, Context, LayerInputs
from h2tune_jax.models.tensors import get_leaf
from h2tune_jax.types import Array, FederationError, ModelSpec, Places, PyTree

Sites = Mapping[str, Any] | None

_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class Cache(NamedTuple):
    """Keys and values of what a causal model has read, in slots that may be padding."""

    keys: Array  # T[Li, B, S, K, head_dim]
    values: Array  # T[Li, B, S, K, head_dim]
    positions: Array  # i32[B, S]
    mask: Array  # bool[B, S]; False slots are padding or not yet written
    length: Array  # i32[], slots used so far


class Model(NamedTuple):
    """One model's static side: pure functions of arrays. Hashable; equal configs give one Model.

    Attributes:
      config: what it was built from.
      spec: the shapes that federated methods need.
      init_fn: key -> base with random weights.
      hidden_fn: (base, sites, inputs, *, key=None) -> [B, T, d], after the final norm.
      unembed_fn: (base, hidden [..., d]) -> f32[..., V], next-token logits of hidden states.
      logits_fn: (base, sites, inputs, *, key=None) -> f32[B, T, V].
      classify_fn: (base, sites, head, inputs, *, key=None) -> f32[B, labels].
      init_head_fn: num_labels -> (key -> head).
      init_cache_fn: (batch, size) -> Cache with that many empty slots.
      step_fn: (base, sites, inputs, cache) -> (hidden [B, T, d], cache); reads T more tokens.
      activations_fn: (base, inputs, *, tokens=False) -> Activations of the frozen model.
    """

    config: ModelConfig
    spec: ModelSpec
    init_fn: Callable[[Array], PyTree]
    hidden_fn: Callable[..., Array]
    unembed_fn: Callable[[PyTree, Array], Array]
    logits_fn: Callable[..., Array]
    classify_fn: Callable[..., Array]
    init_head_fn: Callable[[int], Callable[[Array], PyTree]]
    init_cache_fn: Callable[[int, int], Cache]
    step_fn: Callable[..., tuple[Array, Cache]]
    activations_fn: Callable[..., "Activations"]


class Activations(NamedTuple):
    """What a frozen model computes on a probe: [Li, n, d] text means, or [Li, n, T, d] by token."""

    layers: Array  # output of each block
    inputs: dict[str, Array]  # kind -> what enters the site
    outputs: dict[str, Array]  # kind -> what the site's frozen weight (and bias) makes of it


def site_shapes(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the (D, F) of every site kind of a config."""
    inner, grouped = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {
        "q": (c.width, inner),
        "k": (c.width, grouped),
        "v": (c.width, grouped),
        "o": (inner, c.width),
        "gate": (c.width, c.mlp_width),
        "up": (c.width, c.mlp_width),
        "down": (c.mlp_width, c.width),
    }
    return {kind: shapes[kind] for kind in family_of(c).sites}


def build(config: ModelConfig) -> Model:
    """Build the functions of a model. Cheap: nothing is computed, no weights are held."""
    return _build(config, config.source)


@functools.lru_cache(maxsize=256)
def _build(config: ModelConfig, source: str) -> Model:
    # The source is no part of a config's equality, but a model must keep its own.
    family = family_of(config)
    network = family.network(config)

    def init_fn(key: Array) -> PyTree:
        inputs, context = _prepare(config, family.causal, _dummy(config), None)
        return network.init(key, inputs, _layers(config, None, None, None), context)["params"]

    def run(base: PyTree, sites: Sites, inputs: Mapping, key: Array | None, **kwargs):
        prepared, context = _prepare(config, family.causal, inputs, None)
        layers = _layers(config, sites, key, None)
        return network.apply({"params": base}, prepared, layers, context, **kwargs), context

    def hidden_fn(
        base: PyTree, sites: Sites, inputs: Mapping, *, key: Array | None = None
    ) -> Array:
        return run(base, sites, inputs, key)[0][0]

    def unembed_fn(base: PyTree, hidden: Array) -> Array:
        if config.unembed == "none":
            raise FederationError(f"{config.arch}: this model has no next-token logits")
        weight = base["tokens"]["w"] if config.unembed == "tied" else base["unembed"]["w"]
        form = "...d,vd->...v" if config.unembed == "tied" else "...d,dv->...v"
        logits = jnp.einsum(
            form, hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        if config.logit_cap is not None:
            logits = config.logit_cap * jnp.tanh(logits / config.logit_cap)
        return logits

    def logits_fn(
        base: PyTree, sites: Sites, inputs: Mapping, *, key: Array | None = None
    ) -> Array:
        return unembed_fn(base, hidden_fn(base, sites, inputs, key=key))

    def classify_fn(
        base: PyTree, sites: Sites, head: PyTree, inputs: Mapping, *, key: Array | None = None
    ) -> Array:
        (hidden, _), context = run(base, sites, inputs, key)
        pooled = pool(hidden, context.token_mask, family.head, config)
        if config.pooler:
            weight, bias = (base["pooler"][name].astype(jnp.float32) for name in ("w", "b"))
            pooled = jnp.tanh(pooled.astype(jnp.float32) @ weight + bias[None, :])
        return apply_head(head, pooled, family.head)

    def init_cache_fn(batch: int, size: int) -> Cache:
        if not family.causal:
            raise FederationError(f"{config.arch}: only causal models have a cache")
        if size > config.max_positions:
            raise FederationError(
                f"{config.arch}: {size} tokens are longer than the context, {config.max_positions}"
            )
        shape = (config.num_layers, batch, size, config.num_kv_heads, config.head_dim)
        return Cache(
            keys=jnp.zeros(shape, config.dtype),
            values=jnp.zeros(shape, config.dtype),
            positions=jnp.zeros((batch, size), jnp.int32),
            mask=jnp.zeros((batch, size), bool),
            length=jnp.zeros((), jnp.int32),
        )

    def step_fn(base: PyTree, sites: Sites, inputs: Mapping, cache: Cache) -> tuple[Array, Cache]:
        prepared, context = _prepare(config, family.causal, inputs, cache)
        at = (jnp.zeros((), jnp.int32), cache.length)
        positions = jax.lax.dynamic_update_slice(cache.positions, prepared.positions, at)
        mask = jax.lax.dynamic_update_slice(cache.mask, context.token_mask, at)
        context = context._replace(
            masks=causal_masks(prepared.positions, positions, mask, config.windows),
            slot=cache.length,
        )
        layers = _layers(config, sites, None, (cache.keys, cache.values))
        hidden, (keys, values) = network.apply({"params": base}, prepared, layers, context)
        length = cache.length + prepared.positions.shape[1]
        return hidden, Cache(keys, values, positions, mask, length)

    def activations_fn(base: PyTree, inputs: Mapping, *, tokens: bool = False) -> Activations:
        collection = TOKENS if tokens else MEANS
        (_, state), _ = run(base, None, inputs, None, mutable=[collection])
        layers = state[collection]["layers"]
        sites = {kind: get_leaf(layers, path) for kind, (path, _) in family.sites.items()}
        return Activations(
            layers=layers["out"][0],
            inputs={kind: site["in"][0] for kind, site in sites.items()},
            outputs={kind: site["out"][0] for kind, site in sites.items()},
        )

    def layer_outputs_fn(base: PyTree, probe: Mapping) -> Array:  # [Li, n, d]
        return _by_example(lambda inputs: activations_fn(base, inputs).layers, probe)

    def first_layer_fn(base: PyTree, probe: Mapping) -> Array:  # [n, d]
        # Of two layers, where there are: XLA takes a loop of one apart, and may then round otherwise than
        # for a deeper model that begins with the same layer.
        few = min(config.num_layers, 2)
        short = dataclasses.replace(
            config, num_layers=few, windows=config.windows[:few], kept=(), kept_of=None
        )
        first = {**base, "layers": jax.tree.map(lambda leaf: leaf[:few], base["layers"])}
        read = build(short).activations_fn
        return _by_example(lambda inputs: read(first, inputs).layers, probe)[0]

    def site_activations_fn(base: PyTree, probe: Mapping) -> dict[str, tuple[Array, Array]]:
        seen = activations_fn(base, probe)
        return {kind: (seen.inputs[kind], seen.outputs[kind]) for kind in seen.inputs}

    def site_weights_fn(base: PyTree) -> dict[str, Array]:  # by kind: [Li, D, F]
        return {
            kind: get_leaf(base["layers"], path)["w"] for kind, (path, _) in family.sites.items()
        }

    return Model(
        config=config,
        spec=ModelSpec(
            name=f"{config.arch}-{zlib.crc32(f'{source}{config.kept}'.encode()):08x}",
            num_layers=config.num_layers,
            sites=site_shapes(config),
            layer_outputs_fn=layer_outputs_fn,
            first_layer_fn=first_layer_fn,
            site_activations_fn=site_activations_fn,
            site_weights_fn=site_weights_fn,
            places=Places(config.kept, config.kept_of) if config.kept and config.kept_of else None,
            width=config.width,
        ),
        init_fn=init_fn,
        hidden_fn=hidden_fn,
        unembed_fn=unembed_fn,
        logits_fn=logits_fn,
        classify_fn=classify_fn,
        init_head_fn=functools.partial(init_head, family.head, config.width),
        init_cache_fn=init_cache_fn,
        step_fn=step_fn,
        activations_fn=activations_fn,
    )


def _by_example(read_fn: Callable[[Mapping], Array], inputs: Mapping) -> Array:  # [..., n, d]
    """Read texts [n, T] as they are; of a question's choices [n, Ch, T] take the mean."""
    ids = inputs.get("input_ids")
    if ids is None or ids.ndim != 3:
        return read_fn(inputs)
    flat = {
        name: inputs[name].reshape(-1, *inputs[name].shape[2:])
        for name in _TOKENS
        if inputs.get(name) is not None
    }
    rows = read_fn(flat)
    return rows.reshape(*rows.shape[:-2], *ids.shape[:2], rows.shape[-1]).mean(axis=-2)


def base_shapes(config: ModelConfig) -> PyTree:
    """Return the base's tree with `jax.ShapeDtypeStruct` leaves, computing nothing."""
    return jax.eval_shape(build(config).init_fn, jax.random.key(0))


def _dummy(config: ModelConfig) -> dict[str, Array]:
    if config.image_size:
        shape = (1, config.channels, config.image_size, config.image_size)
        return {"pixel_values": jnp.zeros(shape, jnp.float32)}
    return {"input_ids": jnp.zeros((1, 1), jnp.int32)}


def _prepare(
    config: ModelConfig, causal: bool, inputs: Mapping[str, Array], cache: Cache | None
) -> tuple[Inputs, Context]:
    """Check what the caller gave, count positions, and build the masks (not those over a cache)."""
    if config.image_size:
        return _prepare_images(config, inputs)
    if "input_ids" not in inputs:
        raise FederationError(f"inputs: input_ids is missing; given: {', '.join(inputs)}")
    ids = inputs["input_ids"]
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise FederationError(
            f"inputs: input_ids must be integers [B, T], got {ids.dtype}{list(ids.shape)}"
        )
    if ids.shape[1] > config.max_positions:
        raise FederationError(
            f"inputs: {ids.shape[1]} tokens are longer than the context, {config.max_positions}"
        )
    arrays = {}
    for name in _TOKENS[1:]:
        array = inputs.get(name)
        if array is not None and array.shape != ids.shape:
            raise FederationError(f"inputs: {name} has shape {array.shape}, input_ids {ids.shape}")
        arrays[name] = array
    mask = arrays["attention_mask"]
    mask = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
    positions = arrays["position_ids"]
    if positions is None:
        read = None if cache is None else cache.mask.sum(axis=1, dtype=jnp.int32)[:, None]
        positions = jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1
        positions = jnp.maximum(positions if read is None else positions + read, 0)
    positions = positions.astype(jnp.int32)
    if cache is not None:
        masks = ()
    elif causal:
        masks = causal_masks(positions, positions, mask, config.windows)
    else:
        masks = (jnp.broadcast_to(mask[:, None, None, :], (ids.shape[0], 1, *ids.shape[1:] * 2)),)
    rope = None if config.rope_theta is None else rope_angles(positions, config)
    prepared = Inputs(ids=ids, positions=positions, segments=arrays["token_type_ids"])
    return prepared, Context(token_mask=mask, masks=masks, rope=rope, slot=None)


def _prepare_images(config: ModelConfig, inputs: Mapping[str, Array]) -> tuple[Inputs, Context]:
    if "pixel_values" not in inputs:
        raise FederationError(f"inputs: pixel_values is missing; given: {', '.join(inputs)}")
    images = inputs["pixel_values"]
    expected = (config.channels, config.image_size, config.image_size)
    if images.shape[1:] != expected:
        raise FederationError(f"inputs: pixel_values must be [B, {expected}], got {images.shape}")
    steps = 1 + (config.image_size // config.patch_size) ** 2
    shape = (images.shape[0], steps)
    mask = jnp.ones(shape, bool)
    positions = jnp.broadcast_to(jnp.arange(steps, dtype=jnp.int32)[None, :], shape)
    context = Context(
        token_mask=mask, masks=(jnp.ones((shape[0], 1, steps, steps), bool),), rope=None, slot=None
    )
    return Inputs(ids=images, positions=positions, segments=None), context


def _layers(
    config: ModelConfig, sites: Sites, key: Array | None, cache: tuple[Array, Array] | None
) -> LayerInputs:
    sites = dict(sites or {})
    known = site_shapes(config)
    for kind in sites:
        if kind not in known and kind != BLOCK:
            raise FederationError(f"{config.arch} has no site {kind!r}; it has {', '.join(known)}")
    local = None
    # A choice between masks is needed only where layers differ.
    if len(set(config.windows)) > 1:
        local = jnp.asarray([w is not None for w in config.windows])
    return LayerInputs(
        sites=sites,
        key=None if key is None else jax.random.split(key, config.num_layers),
        local=local,
        cache=cache,
    )

"""Greedy generation with a cache of keys and values."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.models.model import Cache, Model, Sites
from h2tune_jax.types import Array, FederationError, PyTree


class Generated(NamedTuple):
    """What a model continued its prompts with."""

    tokens: Array  # i32[B, N]; the pad id behind the end
    lengths: Array  # i32[B], tokens up to and including the end-of-text token


def generate(
    model: Model,
    base: PyTree,
    sites: Sites,
    inputs: Mapping[str, Array],
    *,
    max_new_tokens: int,
    eos_ids: int | tuple[int, ...],
    pad_id: int | None = None,
) -> Generated:
    """Continue prompts [B, T], padded on either side, with the likeliest token each time.

    Static: model, max_new_tokens, eos_ids, pad_id (the first of eos_ids if not given). Stops when every
    text has ended; may be called under `jit` and `vmap`.
    """
    ends = (eos_ids,) if isinstance(eos_ids, int) else tuple(eos_ids)
    if max_new_tokens < 1:
        raise FederationError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not ends:
        raise FederationError("eos_ids: give at least one end-of-text token")
    pad = ends[0] if pad_id is None else pad_id
    ids = inputs["input_ids"]
    batch, steps = ids.shape
    mask = inputs.get("attention_mask")
    mask = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)

    # The last new token is never read, so it needs no slot.
    cache = model.init_cache_fn(batch, steps + max_new_tokens - 1)
    hidden, cache = model.step_fn(base, sites, inputs, cache)
    last = jnp.argmax(jnp.where(mask, jnp.arange(steps, dtype=jnp.int32)[None, :], -1), axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)

    class State(NamedTuple):
        step: Array  # i32[]
        tokens: Array  # i32[B, N]
        ended: Array  # bool[B]
        hidden: Array  # [B, 1, d], where the next token is read off
        cache: Cache

    def write(state: State) -> State:
        chosen = jnp.argmax(model.unembed_fn(base, state.hidden[:, 0]), axis=-1).astype(jnp.int32)
        chosen = jnp.where(state.ended, jnp.int32(pad), chosen)
        at = (jnp.zeros((), jnp.int32), state.step)
        tokens = jax.lax.dynamic_update_slice(state.tokens, chosen[:, None], at)
        hits = jnp.stack([chosen == end for end in ends]).any(axis=0)
        return state._replace(step=state.step + 1, tokens=tokens, ended=state.ended | hits)

    def read(state: State) -> State:
        at = (jnp.zeros((), jnp.int32), state.step - 1)
        token = jax.lax.dynamic_slice(state.tokens, at, (batch, 1))
        hidden, cache = model.step_fn(base, sites, {"input_ids": token}, state.cache)
        return state._replace(hidden=hidden, cache=cache)

    def unfinished(state: State) -> Any:
        return (state.step < max_new_tokens) & ~state.ended.all()

    state = State(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, max_new_tokens), pad, jnp.int32),
        ended=jnp.zeros(batch, bool),
        hidden=hidden,
        cache=cache,
    )
    state = jax.lax.while_loop(unfinished, lambda s: write(read(s)), write(state))
    hits = jnp.stack([state.tokens == end for end in ends]).any(axis=0)
    lengths = jnp.where(hits.any(axis=1), jnp.argmax(hits, axis=1) + 1, max_new_tokens)
    return Generated(tokens=state.tokens, lengths=lengths.astype(jnp.int32))

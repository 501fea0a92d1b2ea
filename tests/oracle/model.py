"""A small network in NumPy with its gradient written by hand, and the same network in JAX.

    h_0 = x embed
    h <- h + tanh(o(h))                     where the kind `o` exists
    h <- h + down(tanh(gate(h)) * up(h))    where the kind `gate` exists, else down(tanh(up(h)))
    logits = h w + b

Each of `o`, `gate`, `up`, `down` is an adapted product y = x W + s ((x A) + (x A) T) B, or without the
first x A in the pure core. The loss is the mean cross-entropy over the positions that count: examples
[n, d] count one position each, examples [n, t, d] those in `counted`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import h2tune_jax as h2


class Site(NamedTuple):
    """One adapted matrix of one layer."""

    w: np.ndarray  # [D, F]
    a: np.ndarray  # [D, r]
    core: np.ndarray  # [r, r]
    b: np.ndarray  # [r, F]


class Gradients(NamedTuple):
    """What a pullback gives: for each kind stacked over layers, and for the head."""

    a: dict[str, np.ndarray]  # [Li, D, r]
    core: dict[str, np.ndarray]  # [Li, r, r]
    b: dict[str, np.ndarray]  # [Li, r, F]
    head: dict[str, np.ndarray]


# --- NumPy -----------------------------------------------------------------------------------------


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def product(x: np.ndarray, site: Site, scale: float, residual: bool):
    """Multiply by an adapted matrix: -> (y, dy -> (dx, dA, dT, dB))."""
    down = x @ site.a
    turned = down @ site.core + (down if residual else 0.0)
    y = x @ site.w + scale * turned @ site.b

    def pullback(dy):
        d_b = scale * flat(turned).T @ flat(dy)
        d_turned = scale * dy @ site.b.T
        d_core = flat(down).T @ flat(d_turned)
        d_down = d_turned @ site.core.T + (d_turned if residual else 0.0)
        d_a = flat(x).T @ flat(d_down)
        return dy @ site.w.T + d_down @ site.a.T, d_a, d_core, d_b

    return y, pullback


def forward(
    base: dict[str, np.ndarray],
    a: dict[str, np.ndarray],
    core: dict[str, np.ndarray],
    b: dict[str, np.ndarray],
    head: dict[str, np.ndarray],
    x: np.ndarray,
    *,
    scale: float,
    residual: bool,
) -> tuple[np.ndarray, Callable[[np.ndarray], Gradients]]:
    """Run the network: -> (logits, dlogits -> gradients)."""
    kinds = tuple(a)
    depth = len(a["up"])
    hidden, tapes = x @ base["embed"], []
    for layer in range(depth):
        sites = {k: Site(base[k][layer], a[k][layer], core[k][layer], b[k][layer]) for k in kinds}
        run = lambda kind, value, sites=sites: product(value, sites[kind], scale, residual)
        tape: dict[str, Any] = {}
        if "o" in kinds:
            inner, tape["o"] = run("o", hidden)
            tape["tanh_o"] = np.tanh(inner)
            hidden = hidden + tape["tanh_o"]
        up, tape["up"] = run("up", hidden)
        if "gate" in kinds:
            gate, tape["gate"] = run("gate", hidden)
            tape["tanh_gate"], tape["up_value"] = np.tanh(gate), up
            inner = tape["tanh_gate"] * up
        else:
            inner = tape["tanh_up"] = np.tanh(up)
        out, tape["down"] = run("down", inner)
        hidden = hidden + out
        tapes.append(tape)
    last = hidden
    logits = last @ head["w"] + head["b"]

    def pullback(d_logits):
        grads = Gradients(
            *({k: np.zeros_like(tree[k]) for k in kinds} for tree in (a, core, b)),
            {"w": flat(last).T @ flat(d_logits), "b": flat(d_logits).sum(axis=0)},
        )
        d_hidden = d_logits @ head["w"].T
        for layer in reversed(range(depth)):
            tape = tapes[layer]

            def back(kind, dy, tape=tape, layer=layer):
                dx, grads.a[kind][layer], grads.core[kind][layer], grads.b[kind][layer] = tape[
                    kind
                ](dy)
                return dx

            d_inner = back("down", d_hidden)
            if "gate" in kinds:
                d_gate = d_inner * tape["up_value"] * (1 - tape["tanh_gate"] ** 2)
                d_hidden = d_hidden + back("gate", d_gate) + back("up", d_inner * tape["tanh_gate"])
            else:
                d_hidden = d_hidden + back("up", d_inner * (1 - tape["tanh_up"] ** 2))
            if "o" in kinds:
                d_hidden = d_hidden + back("o", d_hidden * (1 - tape["tanh_o"] ** 2))
        return grads

    return logits, pullback


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def counted_positions(examples: dict[str, np.ndarray]) -> np.ndarray:
    """Say which positions the loss counts: bool[n], or bool[n, t]."""
    return examples.get("counted", np.ones(examples["y"].shape, bool))


def cross_entropy(logits: np.ndarray, examples: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """Return the mean over the counted positions, and its gradient in the logits."""
    counted, log_p = counted_positions(examples), log_softmax(logits)
    hot = np.eye(logits.shape[-1])[examples["y"]]
    share = (counted / max(counted.sum(), 1))[..., None]
    return -float((hot * log_p * share).sum()), (np.exp(log_p) - hot) * share


# --- JAX -------------------------------------------------------------------------------------------


def loss_fn(adapters, base, batch, key):
    """Give the library the same network and loss."""
    del key

    def block(hidden, layer):
        weights, sites = layer
        run = lambda kind, value: h2.adapted(value, weights[kind], sites[kind])
        if "o" in sites:
            hidden = hidden + jnp.tanh(run("o", hidden))
        if "gate" in sites:
            inner = jnp.tanh(run("gate", hidden)) * run("up", hidden)
        else:
            inner = jnp.tanh(run("up", hidden))
        return hidden + run("down", inner), None

    weights = {kind: base[kind] for kind in adapters.sites}
    hidden, _ = jax.lax.scan(block, batch.examples["x"] @ base["embed"], (weights, adapters.sites))
    bias = adapters.head["b"]
    logits = hidden @ adapters.head["w"] + jnp.expand_dims(bias, tuple(range(hidden.ndim - 1)))
    labels = batch.examples["y"]
    metrics = {"logits": logits}
    positions = batch.mask
    if "counted" in batch.examples:
        positions = batch.examples["counted"] & batch.mask[:, None]
        metrics["positions"] = positions
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    total = jnp.where(positions, picked, 0).sum()
    return -total / jnp.maximum(positions.sum(), 1).astype(logits.dtype), metrics

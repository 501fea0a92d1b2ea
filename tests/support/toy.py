"""A federation small enough to compile in seconds: two architectures, two tasks, unequal clients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import h2tune_jax as h2

INPUT = 6


def init_base(seed, width, depth, kinds, dtype="float32"):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, dtype)
    return {
        "embed": draw(INPUT, width),
        **{kind: draw(depth, width, width) for kind in kinds},
    }


def loss_fn(adapters, base, batch, key):
    """Cross-entropy behind residual blocks; every kind of site is one product in each block."""
    kinds = sorted(set(base) - {"embed"})
    hidden = jnp.tanh(batch.examples["x"] @ base["embed"])

    def block(hidden, layer):
        weights, sites = layer
        entered = hidden
        for kind in kinds:
            product = h2.adapted(hidden, weights[kind], sites.get(kind), key=key)
            hidden = hidden + jnp.tanh(product)
        return h2.beside_block(entered, hidden, sites.get("block"), key=key), None

    weights = {kind: base[kind] for kind in kinds}
    hidden, _ = jax.lax.scan(block, hidden, (weights, adapters.sites))
    logits = hidden @ adapters.head
    labels, mask = batch.examples["y"], batch.mask.astype(logits.dtype)
    scores = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    mean = lambda values: (values * mask).sum() / jnp.maximum(mask.sum(), 1)
    correct = (logits.argmax(axis=1) == labels).astype(logits.dtype)
    return -mean(scores), {"accuracy": mean(correct), "logits": logits}


def layer_outputs(base, probe):
    probe = probe["x"] if isinstance(probe, dict) else probe  # a client's examples will do
    hidden = jnp.tanh(probe @ base["embed"])
    outputs = []
    for layer in range(base["q"].shape[0]):
        hidden = hidden + jnp.tanh(hidden @ base["q"][layer])
        outputs.append(hidden)
    return jnp.stack(outputs)


def site_activations(base, probe):
    outputs = layer_outputs(base, probe)
    return {
        kind: (outputs, jnp.einsum("lnd,ldf->lnf", outputs, base[kind]))
        for kind in sorted(set(base) - {"embed"})
    }


def site_weights(base):
    return {kind: base[kind] for kind in sorted(set(base) - {"embed"})}


def cohort(name, *, width, depth, rank, kinds, classes, num_clients, **changes):
    model = h2.ModelSpec(
        num_layers=depth,
        sites=dict.fromkeys(kinds, (width, width)),
        layer_outputs_fn=layer_outputs,
        site_activations_fn=site_activations,
        site_weights_fn=site_weights,
        width=width,
    )
    spec = h2.CohortSpec(
        name=name,
        num_clients=num_clients,
        model=model,
        rank=rank,
        loss_fn=loss_fn,
        init_head_fn=lambda key: 0.3 * jax.random.normal(key, (width, classes)),
        budget=h2.Budget(batch_size=4, epochs=1),
    )
    return dataclasses.replace(spec, **changes)


def make_specs(**changes):
    return (
        cohort("narrow", width=8, depth=2, rank=2, kinds=("q", "up"), classes=3, num_clients=5, **changes),
        cohort("wide", width=12, depth=3, rank=4, kinds=("q",), classes=2, num_clients=3, **changes),
    )  # fmt: skip


def make_bases():
    return init_base(1, 8, 2, ("q", "up")), init_base(2, 12, 3, ("q",))


def make_data(specs, size=10, seed=3):
    """Clients hold 10, 9, 8, ... examples; the rows beyond are garbage that must not matter."""
    out = []
    for i, spec in enumerate(specs):
        rng = np.random.default_rng(seed + i)
        classes = 3 if spec.name == "narrow" else 2
        x = rng.normal(size=(spec.num_clients, size, INPUT)).astype(np.float32)
        y = rng.integers(0, classes, size=(spec.num_clients, size)).astype(np.int32)
        held = np.maximum(size - np.arange(spec.num_clients), 1).astype(np.int32)
        for client, count in enumerate(held):
            x[client, count:] = 1e3
        out.append(h2.ClientData({"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.asarray(held)))
    return tuple(out)


def server_set(count=6):
    """A few labelled examples of each cohort's task, as a server may hold."""
    return tuple(
        jax.tree.map(lambda leaf: leaf[0, :count], data.examples)
        for data in make_data(make_specs(), seed=21)
    )


def probe():
    texts = jnp.asarray(np.random.default_rng(9).normal(size=(7, INPUT)), jnp.float32)
    return texts, texts


EVERYONE = (None, None)
SEED = np.uint32(5)


def start(method, specs=None):
    specs = make_specs() if specs is None else specs
    return h2.init_round(method, specs, make_bases(), probe(), jax.random.key(11))


def stir(state):
    """Move a fresh state away from its zeros, so that nothing hides behind them."""

    def noise(path, leaf):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or "opt" in name:
            return leaf  # a second moment must not turn negative
        rng = np.random.default_rng(len(name) + leaf.size)
        leaf = np.asarray(leaf)
        moved = leaf + (0.05 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
        # A layer relation keeps its support.
        return jnp.asarray(np.where(leaf == 0, leaf, moved) if "relation" in name else moved)

    return jax.tree_util.tree_map_with_path(noise, state)


def assert_trees_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_trees_close(one, other, rtol=2e-5, atol=2e-6):
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    jax.tree.map(compare, one, other)

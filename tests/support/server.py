"""A method's server by itself: uploads are made up, nothing is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import toy


def twins(*, ranks=(2, 2), alphas=(16.0, 16.0), num_clients=(3, 2), **changes):
    """Two cohorts of one architecture with different tasks, and one of another architecture."""
    one = functools.partial(toy.cohort, width=8, depth=2, kinds=("q", "up"))
    pair = (
        one("first", rank=ranks[0], classes=3, num_clients=num_clients[0], alpha=alphas[0]),
        one("second", rank=ranks[1], classes=2, num_clients=num_clients[1], alpha=alphas[1]),
    )
    wide = toy.cohort("wide", width=12, depth=3, rank=4, kinds=("q",), classes=2, num_clients=2)
    return tuple(dataclasses.replace(spec, **changes) for spec in (*pair, wide))


def start(method, specs):
    return method.init_server(specs, jax.random.key(0), (None,) * len(specs), None)


def uploads_of(specs, *, parts=("a", "b"), seed=0):
    """Draw every client's factors: leaves [C, Li, ...]."""
    rng = np.random.default_rng(seed)

    def draw(spec, part, kind):
        width, out = spec.model.shapes[kind]
        shape = (width, spec.rank) if part == "a" else (spec.rank, out)
        values = rng.normal(size=(spec.num_clients, spec.model.num_layers, *shape))
        return jnp.asarray(values, jnp.float32)

    return tuple(
        {part: {kind: draw(spec, part, kind) for kind in spec.kinds} for part in parts}
        for spec in specs
    )


def aggregate(method, specs, server, uploads, weights, round_index=0):
    """Run the server's part of a round, as the engine would; an upload of None was not sampled."""
    ids = tuple(jnp.arange(spec.num_clients, dtype=jnp.int32) for spec in specs)
    weights = tuple(jnp.asarray(w, jnp.float32) for w in weights)
    given = []
    for spec, upload, weight in zip(specs, uploads, weights):
        if upload is not None:
            counts = lambda leaf, w=weight: jnp.where(
                w.reshape(-1, *(1,) * (leaf.ndim - 1)) > 0, leaf, 0
            )
            upload = jax.tree.map(counts, upload)
            if method.reduce is not None:
                each = jax.vmap(functools.partial(method.reduce, spec))(upload, weight)
                upload = jax.tree.map(lambda leaf: leaf.sum(axis=0), each)
        given.append(upload)
    rest = tuple(given), weights, ids, jnp.asarray(round_index, jnp.int32)
    bases = (None,) * len(specs)
    return method.server_aggregate(specs, jax.random.key(1), server, bases, None, *rest)


def downloads(method, specs, server):
    ids = tuple(jnp.arange(spec.num_clients, dtype=jnp.int32) for spec in specs)
    return method.broadcast(specs, jax.random.key(2), server, ids, jnp.zeros((), jnp.int32))


def received(method, specs, server, place):
    """The adapters of a fresh client of a cohort right after download."""
    spec, download = specs[place], downloads(method, specs, server)[place]
    client = method.init_client(spec, jax.random.key(3), None, download)
    return method.adapters(spec, server, client, download)


def delta(site):
    """What an adapter adds to a site's weight, in float64: [Li, D, F]."""
    a, b = (np.asarray(x, np.float64) for x in site.fold())
    return site.scale * a @ b


def mean_delta(specs, group, uploads, weights, kind):
    """sum_i s_i scale_i A_i B_i over an architecture, in float64: [Li, D, F]."""
    total, weight = 0.0, 0.0
    for place in group:
        if uploads[place] is None:
            continue
        a, b = (np.asarray(uploads[place][part][kind], np.float64) for part in ("a", "b"))
        w = np.asarray(weights[place], np.float64)
        total = total + specs[place].scale * np.einsum("s,slij,sljk->lik", w, a, b)
        weight = weight + w.sum()
    return total / weight


def close(one, other, tolerance=1e-5):
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)

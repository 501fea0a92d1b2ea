# ruff: noqa: E402 - the process is pinned before anything starts threads
"""FedAvg in JAX by hand: one jitted round, data resident, clients by scan or by vmap."""

import work

ARGS = work.parse(axis="scan")

import jax
import jax.numpy as jnp


def loss(p, x, y):
    logits = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


def local(p, x, y):
    batches = x.reshape(work.STEPS, work.BATCH, -1), y.reshape(work.STEPS, work.BATCH)
    step = lambda p, b: (
        jax.tree.map(lambda a, g: a - work.RATE * g, p, jax.grad(loss)(p, *b)),
        None,
    )
    return jax.lax.scan(step, p, batches)[0]


@jax.jit
def scan_round(p, x, y, ids):
    def add(total, i):
        return jax.tree.map(jnp.add, total, local(p, x[i], y[i])), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, p), ids)
    return jax.tree.map(lambda t: t / len(ids), total)


@jax.jit
def vmap_round(p, x, y, ids):
    after = jax.vmap(local, (None, 0, 0))(p, x[ids], y[ids])
    return jax.tree.map(lambda leaf: leaf.mean(axis=0), after)


def build(axis):
    """(start, round_fn, params_of) as `work.measure` wants them."""
    x, y = map(jnp.asarray, work.make_data())
    program = {"scan": scan_round, "vmap": vmap_round}[axis]

    def round_fn(params, ids):
        return jax.block_until_ready(program(params, x, y, jnp.asarray(ids)))

    return lambda: jax.tree.map(jnp.asarray, work.make_start()), round_fn, lambda params: params


if __name__ == "__main__":
    work.measure(f"bare JAX, {ARGS.axis}", ARGS, *build(ARGS.axis))

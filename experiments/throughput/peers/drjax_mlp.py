# ruff: noqa: E402 - the process is pinned before anything starts threads
"""DrJAX 0.2.1: a jitted program of broadcast, map and mean; data resident."""

import work

ARGS = work.parse()

import drjax
import jax
import jax.numpy as jnp
from bare_jax_mlp import local


def program_for(count):
    """One round for so many clients: DrJAX fixes their number when a program is built."""

    @drjax.program(placements={"clients": count})
    def run(params, x, y):
        sent = drjax.broadcast(params)
        return drjax.reduce_mean(drjax.map_fn(local, (sent, x, y)))

    return jax.jit(lambda params, x, y, ids: run(params, x[ids], y[ids]))


def build():
    x, y = map(jnp.asarray, work.make_data())
    programs = {count: program_for(count) for count in {ARGS.clients, work.CLIENTS}}

    def round_fn(params, ids):
        return jax.block_until_ready(programs[len(ids)](params, x, y, jnp.asarray(ids)))

    return lambda: jax.tree.map(jnp.asarray, work.make_start()), round_fn, lambda params: params


if __name__ == "__main__":
    work.measure("DrJAX", ARGS, *build())

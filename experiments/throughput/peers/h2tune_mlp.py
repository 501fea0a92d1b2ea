# ruff: noqa: E402 - the process is pinned before anything starts threads
"""h2tune_jax: FedAvg through `make_round`, data resident, client ids sampled every round.

With `--devices n` the CPU's cores are n devices, over which a round's clients are split.
"""

import work

ARGS = work.parse(devices=1)

import jax
import jax.numpy as jnp
import numpy as np

import h2tune_jax as h2

jax.config.update("jax_num_cpu_devices", ARGS.devices)


def loss_fn(adapters, base, batch, key):
    p, x, y = adapters.head, batch.examples["x"], batch.examples["y"]
    logits = jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]
    mask = batch.mask.astype(losses.dtype)
    return (losses * mask).sum() / mask.sum(), {}


def build():
    """(start, round_fn, params_of) as `work.measure` wants them."""
    method = h2.fedavg(learning_rate=work.RATE)
    spec = h2.CohortSpec(
        name="mlp",
        num_clients=work.CLIENTS,
        model=h2.ModelSpec(num_layers=1, sites={}),
        rank=1,
        loss_fn=loss_fn,
        init_head_fn=lambda key: jax.tree.map(jnp.asarray, work.make_start()),
        budget=h2.Budget(batch_size=work.BATCH, epochs=1, shuffle=False),
    )
    x, y = map(jnp.asarray, work.make_data())
    counts = jnp.full(work.CLIENTS, work.EXAMPLES, jnp.int32)
    data = (h2.ClientData({"x": x, "y": y}, counts),)
    mesh, place = None, lambda tree: tree
    if ARGS.devices > 1:
        auto = jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((ARGS.devices,), ("clients",), (auto,))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        place = lambda tree: jax.device_put(tree, everywhere)
    data = place(data)
    program = h2.make_round(method, (spec,), mesh=mesh)

    def start():
        return place(h2.init_round(method, (spec,), ((),), None, jax.random.key(0)))

    def round_fn(state, ids):
        state, _ = program(
            state, ((),), data, (jnp.asarray(ids),), (None,), method.hyper, np.uint32(0)
        )
        return jax.block_until_ready(state)

    return start, round_fn, lambda state: state.server.models["mlp"]


if __name__ == "__main__":
    name = "h2tune_jax" if ARGS.devices == 1 else f"h2tune_jax, {ARGS.devices} devices"
    work.measure(name, ARGS, *build())

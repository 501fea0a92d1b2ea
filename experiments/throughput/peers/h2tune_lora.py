# ruff: noqa: E402 - the process is pinned before anything starts threads
"""h2tune_jax: FedIT (averaged LoRA) on MiniLM through `make_round`.

With `--devices n` the CPU's cores are n devices, over which the clients are split.
"""

import work

ARGS = work.parse(steps=4, axis="auto", devices=1)

import jax
import jax.numpy as jnp
import lora_work
import numpy as np

import h2tune_jax as h2
from h2tune_jax import models, tasks
from h2tune_jax.methods.fedit import fedit


def build(args):
    """(start, round_fn) as `lora_work.measure` wants them."""
    model, base = models.load_hf(lora_work.ASSET, pooling="mean")
    method = fedit(learning_rate=lora_work.RATE)
    forward = tasks.forward_of(model, "classification")
    spec = h2.CohortSpec(
        name="minilm",
        num_clients=args.clients,
        model=model.spec,
        rank=lora_work.RANK,
        alpha=lora_work.ALPHA,
        targets=lora_work.SITES,
        loss_fn=tasks.make_loss_fn(forward, "classification"),
        init_head_fn=model.init_head_fn(lora_work.CLASSES),
        budget=h2.Budget(batch_size=lora_work.BATCH, epochs=1, shuffle=False),
    )
    ids, labels = map(jnp.asarray, lora_work.make_data(args.clients, args.steps))
    examples = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": labels}
    counts = jnp.full(args.clients, ids.shape[1], jnp.int32)
    data = (h2.ClientData(examples, counts),)
    axis = int(args.axis) if args.axis.isdigit() else args.axis
    mesh, place = None, lambda tree: tree
    if args.devices > 1:
        auto = jax.sharding.AxisType.Auto
        mesh = jax.make_mesh((args.devices,), ("clients",), (auto,))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        place = lambda tree: jax.device_put(tree, everywhere)
    base, data = place((base, data))
    program = h2.make_round(method, (spec,), client_axis=axis, mesh=mesh)

    def start():
        given = lora_work.make_start()
        state = h2.init_round(method, (spec,), (base,), None, jax.random.key(0))
        factors = {part: jax.tree.map(jnp.asarray, given[part]) for part in ("a", "b")}
        server = state.server._replace(factors=dict.fromkeys(state.server.factors, factors))
        (client,) = state.clients
        (name,) = client.params["head"]
        spread = lambda leaf: jnp.broadcast_to(leaf, (args.clients, *leaf.shape))
        head = {name: {"w": spread(given["w"]), "b": spread(given["bias"])}}
        client = client._replace(params={**client.params, "head": head})
        return place(state._replace(server=server, clients=(client,)))

    def round_fn(state):
        state, metrics = program(state, (base,), data, None, None, method.hyper, np.uint32(0))
        jax.block_until_ready(state)
        return state, metrics.clients["minilm"]["loss"].mean()

    return start, round_fn


if __name__ == "__main__":
    if ARGS.devices > 1:
        jax.config.update("jax_num_cpu_devices", ARGS.devices)
    name = "h2tune_jax" if ARGS.devices == 1 else f"h2tune_jax, {ARGS.devices} devices"
    lora_work.measure(name, ARGS, *build(ARGS))

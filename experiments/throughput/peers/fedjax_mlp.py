# ruff: noqa: E402 - the process is pinned before anything starts threads
"""fedjax 0.0.17 (on jax 0.4.25): its FedAvg, with its default backend for clients (jit, one by one)."""

import work

ARGS = work.parse()

import fedjax
import haiku as hk
import jax
import numpy as np


def build():
    x, y = work.make_data()
    name = lambda i: b"%05d" % i
    clients = {name(i): {"x": x[i], "y": y[i]} for i in range(work.CLIENTS)}
    federation = fedjax.InMemoryFederatedData(clients)
    layers = lambda: [hk.Linear(work.HIDDEN), jax.nn.relu, hk.Linear(work.CLASSES)]
    network = hk.transform(lambda batch: hk.Sequential(layers())(batch["x"]))
    model = fedjax.create_model_from_haiku(
        network,
        sample_batch={"x": x[0, :1], "y": y[0, :1]},
        train_loss=lambda batch, out: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], out),
    )
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        fedjax.model_grad(model),
        fedjax.optimizers.sgd(work.RATE),
        fedjax.optimizers.sgd(1.0),
        fedjax.ShuffleRepeatBatchHParams(batch_size=work.BATCH, num_epochs=1, skip_shuffle=True),
    )

    def start():
        p = work.make_start()
        params = {
            "linear": {"w": p["w1"], "b": p["b1"]},
            "linear_1": {"w": p["w2"], "b": p["b2"]},
        }
        return algorithm.init(jax.tree_util.tree_map(jax.numpy.asarray, params))

    def round_fn(state, ids):
        keys = jax.random.split(jax.random.PRNGKey(0), len(ids))
        chosen = federation.get_clients([name(i) for i in ids])
        named = [(client, data, key) for (client, data), key in zip(chosen, keys)]
        state, _ = algorithm.apply(state, named)
        jax.block_until_ready(state.params)
        return state

    def params_of(state):
        one, two = state.params["linear"], state.params["linear_1"]
        leaves = (one["w"], one["b"], two["w"], two["b"])
        return dict(zip(("w1", "b1", "w2", "b2"), map(np.asarray, leaves)))

    return start, round_fn, params_of


if __name__ == "__main__":
    work.measure("fedjax", ARGS, *build())

"""A model that knows nothing of this library joins a federation.

Two groups of clients hold small residual networks of different width and depth, in plain JAX, and solve
different tasks on different inputs. They share H2Tune's middle matrices and nothing else. What the
library needs of the model stands between the two rulers: the shapes of its sites, and a loss function
that calls `adapted(x, w, site)` where the model multiplies by a frozen weight.

Run it: python experiments/bring_your_own_model/federate.py    (about half a minute on two cores)
"""

import jax
import jax.numpy as jnp
import numpy as np

import h2tune_jax as h2

# --- a stranger's model: plain JAX, written before it ever heard of federation ---------------------


def init_base(key, width, depth):
    """Frozen weights: an embedding and `depth` residual blocks with two products each."""
    keys = jax.random.split(key, 3)
    draw = lambda key, *shape: jax.random.normal(key, shape) * shape[-2] ** -0.5
    return {
        "embed": draw(keys[0], 16, width),
        "up": draw(keys[1], depth, width, 2 * width),
        "down": draw(keys[2], depth, 2 * width, width),
    }


# --- what joins it to a federation -----------------------------------------------------------------


def loss_fn(adapters, base, batch, key):
    """Cross-entropy of the group's own task."""
    del key  # no dropout here

    def block(hidden, layer):
        up, down, sites = layer
        inner = jax.nn.relu(h2.adapted(hidden, up, sites["up"]))
        return hidden + 0.5 * h2.adapted(inner, down, sites["down"]), None

    hidden = jnp.tanh(batch.examples["x"] @ base["embed"])
    hidden, _ = jax.lax.scan(block, hidden, (base["up"], base["down"], adapters.sites))
    logits = hidden @ adapters.head["w"] + adapters.head["b"][None, :]
    labels, mask = batch.examples["y"], batch.mask.astype(logits.dtype)
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    mean = lambda values: (values * mask).sum() / jnp.maximum(mask.sum(), 1)
    correct = (logits.argmax(axis=1) == labels).astype(logits.dtype)
    return -mean(log_likelihood), {"accuracy": mean(correct), "logits": logits}


def cohort(name, *, width, depth, rank, classes, num_clients):
    """Describe one group of clients to the library."""
    return h2.CohortSpec(
        name=name,
        num_clients=num_clients,
        model=h2.ModelSpec(
            num_layers=depth, sites={"up": (width, 2 * width), "down": (2 * width, width)}
        ),
        rank=rank,
        loss_fn=loss_fn,
        init_head_fn=lambda key: {
            "w": 0.02 * jax.random.normal(key, (width, classes)),
            "b": jnp.zeros(classes),
        },
        budget=h2.Budget(batch_size=16, epochs=2),
    )


# ---------------------------------------------------------------------------------------------------


def make_data(seed, num_clients, classes, size):
    """Draw labelled points: `classes` by a random two-layer rule that a group has in common."""
    rng = np.random.default_rng(seed)
    hidden, out = rng.normal(size=(16, 24)), rng.normal(size=(24, classes))
    x = rng.normal(size=(num_clients, size, 16)).astype(np.float32)
    y = np.argmax(np.maximum(x @ hidden, 0) @ out, axis=-1).astype(np.int32)
    return h2.ClientData(
        {"x": jnp.asarray(x), "y": jnp.asarray(y)}, jnp.full(num_clients, size, jnp.int32)
    )


def main(rounds=15):
    specs = (
        cohort("narrow", width=32, depth=3, rank=4, classes=3, num_clients=6),
        cohort("wide", width=48, depth=5, rank=8, classes=4, num_clients=4),
    )
    bases = (init_base(jax.random.key(1), 32, 3), init_base(jax.random.key(2), 48, 5))
    train = make_data(3, 6, 3, 128), make_data(4, 4, 4, 128)
    test = make_data(3, 12, 3, 128), make_data(4, 8, 4, 128)
    # The same rules, other points: the second half of the clients of a larger draw.
    test = tuple(
        jax.tree.map(lambda leaf, c=spec.num_clients: leaf[c:], data)
        for spec, data in zip(specs, test)
    )

    accuracy = {}
    for method in (h2.h2tune(learning_rate=3e-3), h2.local(learning_rate=3e-3)):
        round_fn = h2.make_round(method, specs)
        evaluate = h2.make_evaluate(method, specs, batch_size=128)
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        for _ in range(rounds):
            state, metrics = round_fn(state, bases, train, None, None, method.hyper, jnp.uint32(0))
        results = evaluate(state, bases, test)
        accuracy[method.name] = {name: float(r["accuracy"].mean()) for name, r in results.items()}
        traffic = {n: int(m["numbers_up"][0]) for n, m in metrics.clients.items()}
        print(
            f"{method.name:8} accuracy {accuracy[method.name]}  numbers sent up a client {traffic}"
        )
    return accuracy


if __name__ == "__main__":
    main()

"""Rounds in other precisions than 32 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import h2tune_jax as h2


@pytest.mark.parametrize("client_axis", ["scan", "vmap"])
def test_a_16_bit_mean_over_many_clients_is_a_mean(client_axis):
    spec = h2.CohortSpec(
        name="many",
        num_clients=600,
        model=h2.ModelSpec(num_layers=1, sites={}),
        rank=1,
        loss_fn=lambda adapters, base, batch, key: (
            0.5 * ((adapters.head - batch.examples) ** 2).mean(), {}
        ),
        init_head_fn=lambda key: jnp.zeros((), jnp.bfloat16),
        budget=h2.Budget(batch_size=1, epochs=1),
    )  # fmt: skip
    method = h2.fedavg(learning_rate=1.0)
    pulls = jnp.asarray(np.arange(600) % 2, jnp.bfloat16)[:, None]
    data = h2.ClientData(pulls, jnp.ones(600, jnp.int32))
    state = h2.init_round(method, (spec,), ((),), None, jax.random.key(0))
    state, _ = h2.make_round(method, (spec,), client_axis=client_axis)(
        state, ((),), (data,), None, None, method.hyper, toy.SEED
    )
    assert state.server.models["many"] == 0.5


def test_16_bit_losses_are_averaged_in_float32():
    spec = h2.CohortSpec(
        name="one",
        num_clients=1,
        model=h2.ModelSpec(num_layers=1, sites={}),
        rank=1,
        loss_fn=lambda adapters, base, batch, key: (0.0 * adapters.head + 1, {}),
        init_head_fn=lambda key: jnp.zeros((), jnp.bfloat16),
        budget=h2.Budget(batch_size=1, steps=1500),
    )
    method = h2.fedavg()
    data = h2.ClientData(jnp.zeros((1, 1)), jnp.ones(1, jnp.int32))
    state = h2.init_round(method, (spec,), ((),), None, jax.random.key(0))
    _, metrics = h2.make_round(method, (spec,))(
        state, ((),), (data,), None, None, method.hyper, toy.SEED
    )
    assert metrics.clients["one"]["loss"] == 1


def test_x64_with_strict_promotion_and_shuffled_data():
    with jax.enable_x64(True):
        method, specs = h2.local(), toy.make_specs(dtype="float64")
        wide = lambda tree: jax.tree.map(
            lambda x: x.astype(jnp.float64 if x.dtype == jnp.float32 else jnp.int64), tree
        )
        bases, data = wide(toy.make_bases()), wide(toy.make_data(specs))
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        round_fn = h2.make_round(method, specs)
        jax.eval_shape(round_fn, state, bases, data, None, None, method.hyper, np.uint32(0))

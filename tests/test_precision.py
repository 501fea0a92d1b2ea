"""Rounds in other precisions than 32 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


PURE = {"core": "pure", "train_relation": False, "lambda_norm": None}


def one_client(loss_fn, *, steps, pulls=(1.0,), sites=("q",)):
    """One bfloat16 client of one layer, whose batches hold one number each, in order."""
    spec = h2.CohortSpec(
        name="one",
        num_clients=1,
        model=h2.ModelSpec(num_layers=1, sites=dict.fromkeys(sites, (1, 1))),
        rank=1,
        loss_fn=loss_fn,
        init_head_fn=lambda key: jnp.ones((), jnp.bfloat16),
        budget=h2.Budget(batch_size=1, steps=steps, shuffle=False),
        dtype="bfloat16",
    )
    return (spec,), (h2.ClientData(jnp.asarray([pulls], jnp.bfloat16), jnp.asarray([len(pulls)])),)


def one_round(method, specs, data):
    state = h2.init_round(method, specs, ((),), None, jax.random.key(0))
    run = h2.make_round(method, specs, donate=False)
    after, metrics = run(state, ((),), data, None, None, method.hyper, toy.SEED)
    assert metrics.rejected == {"one": 0}
    return state, after


def first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def slope_of_one(adapters, base, batch, key):
    """A loss whose gradient is 1 in every entry, of parts in bfloat16."""
    leaves = jax.tree.leaves(adapters)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in leaves)
    return sum((leaf.astype(jnp.float32).sum() for leaf in leaves), jnp.zeros(())), {}


@pytest.mark.parametrize(
    "make",
    [
        h2.fedavg,
        h2.local,
        lambda **options: h2.h2tune(**options, **PURE, alternation="joint"),
        lambda **options: h2.h2tune(**options, **PURE, warmup_rounds=0, lambda_distil=None),
    ],
    ids=["fedavg", "local", "h2tune-joint", "h2tune-halves"],
)
def test_16_bit_parts_move_by_steps_below_half_a_unit_in_the_last_place(make):
    # Below 1 bfloat16 has steps of 2^-8: one of 2^-10 alone is lost there, 1024 of them are 1.
    specs, data = one_client(slope_of_one, steps=1024, sites=() if make is h2.fedavg else ("q",))
    method = make(learning_rate=2**-10, optimizer=optax.identity())
    old, new = (
        jax.tree.leaves(method.adapters(specs[0], state.server, first(state.clients[0]), None))
        for state in one_round(method, specs, data)
    )
    for before, after in zip(old, new, strict=True):
        exact = np.asarray(before, float) - 1
        np.testing.assert_array_equal(after, jnp.asarray(exact, jnp.bfloat16))


@pytest.mark.parametrize("name", ["fedavg", "fedit", "h2tune"])
def test_the_proximal_pull_sees_such_steps_too(name):
    # d <- d - rate (1 + mu d), so that after k steps d = -(1 - (1 - rate mu)^k) / mu.
    moved = -(1 - (1 - 2**-10) ** 1024)
    specs, data = one_client(slope_of_one, steps=1024, sites=() if name == "fedavg" else ("q",))
    options = {**PURE, "alternation": "joint"} if name == "h2tune" else {}
    method = getattr(h2, name)(learning_rate=2**-10, optimizer=optax.identity(), **options)
    states = one_round(h2.proximal(method, mu=1.0), specs, data)
    old, new = (
        jax.tree.leaves([getattr(state.server, field) for field in method.shared])
        for state in states
    )
    for before, after in zip(old, new, strict=True):
        assert after.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(after, float), np.asarray(before, float) + moved, rtol=2**-8
        )


@pytest.mark.parametrize("name", ["local", "h2tune"])
def test_16_bit_second_moments_decay(name):
    """After one gradient of 1 Adam's are 0.001 * 0.999^k; 0.999 itself is 1 in bfloat16."""

    def first_alone(adapters, base, batch, key):
        loss, metrics = slope_of_one(adapters, base, batch, key)
        return (batch.examples.astype(jnp.float32) * loss).sum(), metrics

    options = {"optimizer_state": "kept", "learning_rate": 1e-6}
    if name == "h2tune":
        options |= {**PURE, "alternation": "joint"}
    specs, data = one_client(first_alone, steps=100, pulls=(1.0,) + (0.0,) * 99)
    method = getattr(h2, name)(**options)
    _, after = one_round(method, specs, data)
    (client,) = after.clients
    states = (client.opt,) if name == "local" else (client.shared_opt, client.own_opt)
    moments = jax.tree.leaves([opt.nu for opt in states])
    assert {leaf.dtype.name for leaf in moments} == {"float32"}
    # The head's, whose gradient was 1.
    head = states[-1].nu["head"]
    np.testing.assert_allclose(head, [0.001 * 0.999**99], rtol=1e-5)

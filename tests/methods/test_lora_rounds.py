"""Whole rounds of the LoRA methods: in float64, scanned, and split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import h2tune_jax as h2

BUILDS = {
    name: lambda name=name: getattr(h2, name)(learning_rate=0.02, optimizer=optax.identity())
    for name in (
        "local", "centralised", "fedit", "ffa_lora", "fedsa_lora", "hetlora", "flexlora", "flora",
        "fedex_lora",
    )
}  # fmt: skip
BUILDS["wrapped"] = lambda: h2.server_optimizer(
    h2.proximal(BUILDS["fedit"](), 0.1), optax.adam(0.05)
)


def in_standard_promotion(adapters, base, batch, key):
    """The toy's loss counts in int64 where x64 is on; what is tested is the methods' own maths."""
    with jax.numpy_dtype_promotion("standard"):
        loss, metrics = toy.loss_fn(adapters, base, batch, key)
    return loss.astype(base["embed"].dtype), metrics


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", BUILDS)
def test_rounds_scan_in_every_dtype_with_x64(name, dtype):
    with jax.enable_x64(True):
        method = BUILDS[name]()
        budget = h2.Budget(batch_size=4, steps=2)
        specs = toy.make_specs(dtype=dtype, budget=budget, loss_fn=in_standard_promotion)
        bases, data = toy.make_bases(), toy.make_data(specs)
        if dtype == "float64":
            widen = lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x
            bases, data = jax.tree.map(widen, (bases, data))
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        round_fn = h2.make_round(method, specs, donate=False)
        step = lambda state, _: round_fn(state, bases, data, None, None, method.hyper, toy.SEED)
        after, metrics = jax.jit(lambda state: jax.lax.scan(step, state, length=3))(state)
        describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert describe(after) == describe(state)
        assert all(int(count.sum()) == 0 for count in metrics.rejected.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_eight_devices_give_the_same_rounds_as_one(cpu_devices, name):
    method, specs = BUILDS[name](), toy.make_specs()
    mesh = jax.make_mesh(
        (8,), ("clients",), devices=cpu_devices, axis_types=(jax.sharding.AxisType.Auto,)
    )
    args = toy.make_bases(), toy.make_data(specs), None, None, method.hyper, toy.SEED
    expected = state = toy.start(method)
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    alone = h2.make_round(method, specs, donate=False)
    together = h2.make_round(method, specs, mesh=mesh, donate=False)
    for _ in range(2):
        expected, _ = alone(expected, *args)
        state, _ = together(state, *args)
    host = lambda tree: jax.tree.map(np.asarray, tree)
    toy.assert_trees_close(host(state), host(expected), rtol=1e-3, atol=1e-4)

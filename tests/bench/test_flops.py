import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import h2tune_jax as h2
from h2tune_jax.bench.cases import default_case
from h2tune_jax.bench.workload import build


def count_products(jaxpr):
    """Operations of all matrix products of a program, loops over layers included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            summed = np.prod([eqn.invars[0].aval.shape[axis] for axis in left], dtype=np.int64)
            total += 2 * summed * np.prod(eqn.outvars[0].aval.shape, dtype=np.int64)
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(eqn.params):
            total += times * count_products(inner)
    return int(total)


def products_of_a_step(load):
    """What one client's gradient of one batch multiplies."""
    draw = lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype)
    state = jax.eval_shape(
        lambda base, key: h2.init_round(load.method, load.specs, (base,), None, key),
        load.base_shapes,
        jax.random.key(0),
    )
    size = load.spec.budget.batch_size
    one = lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[2:]), leaf.dtype)
    batch = h2.Batch(
        jax.tree.map(one, load.data_shapes.examples), jax.ShapeDtypeStruct((size,), bool)
    )

    def gradient(server, clients, base, batch):
        client = jax.tree.map(lambda leaf: leaf[0], clients)
        adapters = load.method.adapters(load.spec, server, client, None)
        loss = lambda adapters: load.spec.loss_fn(adapters, base, batch, None)[0]
        return jax.grad(loss)(adapters)

    shapes = jax.tree.map(draw, (state.server, state.clients[0], load.base_shapes))
    return count_products(jax.make_jaxpr(gradient)(*shapes, batch).jaxpr)


@pytest.mark.parametrize("changes", [{}, {"rank": 3, "batch": 5, "length": 12}])
def test_the_formula_of_a_language_model_counts_what_its_program_multiplies(changes):
    load = build(default_case("tiny", "cpu", clients=1, **changes))
    assert products_of_a_step(load) == load.flops


def test_the_formula_holds_for_next_token_losses_and_grouped_heads(monkeypatch):
    from h2tune_jax.bench import workload

    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
    small |= {"num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 70}
    monkeypatch.setitem(workload.SHAPES, "llama-3.2-1b", workload.LLAMA | small)
    load = build(default_case("llama-3.2-1b", "cpu", clients=1, length=10, dtype="float32"))
    assert products_of_a_step(load) == load.flops


def test_the_formula_of_the_mlp_counts_what_its_program_multiplies():
    load = build(default_case("mlp", "cpu", clients=1, steps=1))
    assert products_of_a_step(load) == load.flops


def test_alternating_halves_and_clients_multiply_the_count():
    once = build(default_case("tiny", "cpu", clients=1)).flops
    assert build(default_case("tiny", "cpu", clients=3)).flops == 3 * once
    assert build(default_case("tiny", "cpu", clients=1, steps=2)).flops == 2 * once
    assert build(default_case("tiny", "cpu", clients=1, method="h2tune")).flops == 2 * once

"""One client's local training: the order of its examples, its steps, and its descent.

Every method's `client_update` is written with these; none of them knows a client axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from h2tune_jax.types import (
    Array,
    Batch,
    Budget,
    ClientData,
    FederationError,
    Metrics,
    PyTree,
    at_least_float32,
)

Schedule = Callable[[Array, Array], Array]
"""(step i32[], num_steps i32[]) -> multiplier of every learning rate; restarts every round."""


def cosine_schedule(warmup: float = 0.0) -> Schedule:
    """Rise linearly over the first `warmup` of a round's steps, then fall to zero as a half cosine.

    As elsewhere, the first step of a rise is taken at rate 0 and a rise takes a whole step at least: a
    round of one step with any warm-up trains nothing.
    """

    def multiplier(step: Array, num_steps: Array) -> Array:
        dtype = jnp.result_type(float)  # float64 where x64 is on
        step, num_steps = step.astype(dtype), num_steps.astype(dtype)
        rise = jnp.ceil(warmup * num_steps)
        climb = step / jnp.maximum(rise, 1)
        along = (step - rise) / jnp.maximum(num_steps - rise, 1)
        return jnp.where(step < rise, climb, 0.5 * (1 + jnp.cos(jnp.pi * along)))

    return multiplier


def pace(rate: Array, schedule: Schedule | None, step: Array, num_steps: Array) -> Array:
    """Return a learning rate at this step of the round."""
    return rate if schedule is None else rate * schedule(step, num_steps).astype(rate.dtype)


StepFn = Callable[[PyTree, Batch, Array, Array, Array], tuple[PyTree, Metrics]]
"""(carry, batch, key, step, num_steps) -> (carry, scalar metrics)."""


def room(data: ClientData) -> int:
    """Return n, the rows that one client's arrays have room for."""
    return jax.tree.leaves(data.examples)[0].shape[0]


def trim(data: ClientData) -> ClientData:
    """Make one client's count i32 and no larger than the rows that there are."""
    return ClientData(data.examples, jnp.clip(data.num_examples.astype(jnp.int32), 0, room(data)))


def count_steps(budget: Budget, num_examples: Array) -> Array:
    """Return how many steps a client with so many examples takes in one round."""
    if budget.steps is not None:
        return jnp.where(num_examples > 0, budget.steps, 0).astype(jnp.int32)
    assert budget.epochs is not None
    return (budget.epochs * -(-num_examples // budget.batch_size)).astype(jnp.int32)


def _order(budget: Budget, key: Array, epoch: Array, num_examples: Array, size: int) -> Array:
    """Positions of the client's examples in the order of one epoch; padding rows come last."""
    if not budget.shuffle:
        return jnp.arange(size, dtype=jnp.int32)
    draws = jax.random.uniform(jax.random.fold_in(key, epoch), (size,))
    behind = jnp.where(jnp.arange(size, dtype=jnp.int32) < num_examples, draws, 2.0)
    return jnp.argsort(behind).astype(jnp.int32)


def batch_reader(
    budget: Budget, key: Array, data: ClientData
) -> Callable[[Array], Batch]:  # step i32[] -> Batch
    """Give the function that reads the batch of a step from the client's arrays on the device."""
    size, width = room(data), budget.batch_size
    num_examples = data.num_examples
    steps_per_epoch = jnp.maximum(-(-num_examples // width), 1)
    if budget.epochs is not None:
        # All orders at once: one sort an epoch, however many steps it has.
        epochs = jnp.arange(budget.epochs, dtype=jnp.int32)
        orders = jax.vmap(lambda e: _order(budget, key, e, num_examples, size))(epochs)
        read_order = lambda epoch: orders[epoch]
    else:
        read_order = lambda epoch: _order(budget, key, epoch, num_examples, size)

    def read(step: Array) -> Batch:
        place = (step % steps_per_epoch) * width + jnp.arange(width, dtype=jnp.int32)
        rows = read_order(step // steps_per_epoch)[jnp.minimum(place, size - 1)]
        take = lambda leaf: leaf.at[rows].get(mode="promise_in_bounds")  # an order holds rows only
        examples = jax.tree.map(take, data.examples)
        return Batch(examples, place < num_examples)

    return read


def run_steps(
    budget: Budget, key: Array, data: ClientData, carry: PyTree, step_fn: StepFn
) -> tuple[PyTree, dict[str, Array]]:
    """Run one client's steps of one round: -> (carry, means of the metrics over its steps).

    The loop ends where the client's own batches end, so a batch of clients costs as many steps as the
    longest of them. The means carry `steps` with them.
    """
    order_key, step_key = jax.random.split(key)
    read = batch_reader(budget, order_key, data)
    num_steps = count_steps(budget, data.num_examples)

    @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for the loop
    def one_step(step: Array, carry: PyTree) -> tuple[PyTree, Metrics]:
        return step_fn(carry, read(step), jax.random.fold_in(step_key, step), step, num_steps)

    zero = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(one_step, zero, carry)[1]
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, at_least_float32(leaf.dtype)), shapes)

    def body(step: Array, state: tuple[PyTree, Metrics]) -> tuple[PyTree, Metrics]:
        carry, sums = state
        carry, metrics = one_step(step, carry)
        add = lambda total, value: total + value.astype(total.dtype)
        return carry, jax.tree.map(add, sums, metrics)

    carry, sums = jax.lax.fori_loop(zero, num_steps, body, (carry, sums))
    count = jnp.maximum(num_steps, 1)
    means = jax.tree.map(lambda total: total / count.astype(total.dtype), sums)
    return carry, {**means, "steps": num_steps}


def widen(parts: PyTree) -> PyTree:
    """Give parts the dtype that they are trained in within a round: float32 at least.

    In bfloat16 0.999 is 1, so that Adam's second moment never decays, and a step below half a unit in
    the last place is lost. Parts of 32 bits and more are what they were.
    """
    return jax.tree.map(lambda leaf: leaf.astype(at_least_float32(leaf.dtype)), parts)


def narrow(parts: PyTree, like: PyTree) -> PyTree:
    """Give parts that were widened the dtypes of `like` again: for a loss function, and to be kept."""
    return jax.tree.map(lambda leaf, own: leaf.astype(own.dtype), parts, like)


def descend(
    optimizer: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    rates: PyTree,
    *,
    decay: PyTree | None = None,
    keep: PyTree | None = None,
) -> tuple[PyTree, PyTree]:
    """Take one step: params - rate * (update + decay * params) -> (params, optimiser state).

    `optimizer` has no learning rate of its own (`optax.scale_by_adam()`, `optax.identity()`): rates are
    arrays, so that runs can be mapped over them. `rates` and `decay` are prefixes of `params`. `keep`
    has a mask a leaf, or None: where it is False the parameter stays as it is, whatever the optimiser's
    moments say. All is computed in the dtypes of `params`: see `widen`.
    """
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, state = optimizer.update(grads, state, params)
    decay = jax.tree.map(lambda _: None, params) if decay is None else _broadcast(decay, params)
    keep = jax.tree.map(lambda _: None, params) if keep is None else keep

    def step(param, update, rate, decay, mask):
        if decay is not None:
            update = update + jnp.asarray(decay, param.dtype) * param
        moved = param - jnp.asarray(rate, param.dtype) * update
        return moved if mask is None else jnp.where(mask, moved, param)

    leaves, treedef = jax.tree.flatten(params)
    parts = [
        treedef.flatten_up_to(tree) for tree in (updates, _broadcast(rates, params), decay, keep)
    ]
    return treedef.unflatten([step(*args) for args in zip(leaves, *parts)]), state


def _broadcast(prefix: PyTree, full: PyTree) -> PyTree:
    """Repeat each leaf of a prefix tree (None counts as a leaf) over the subtree below it."""
    is_none = lambda node: node is None
    return jax.tree.map(
        lambda leaf, subtree: jax.tree.map(lambda _: leaf, subtree), prefix, full, is_leaf=is_none
    )


def scalar_metrics(where: str, metrics: Metrics) -> dict[str, Any]:
    """Keep a loss function's scalars; `logits` and `positions` are for the method alone."""
    scalars = {}
    for name, value in metrics.items():
        if name in ("logits", "positions"):
            continue
        if jnp.shape(value) != ():
            raise FederationError(
                f"{where}: loss_fn's metric {name!r} has shape {jnp.shape(value)}, expected a scalar; "
                "arrays are allowed as 'logits' and 'positions' only"
            )
        scalars[name] = jnp.asarray(value)
    return scalars

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


def all_finite(tree: PyTree) -> Array:  # bool[]
    """Say whether no number of a tree is infinite or NaN."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]

    def spread(leaf):  # 0 wherever all is finite, nan where 0 times an entry is not 0
        rows = leaf.reshape(-1, leaf.shape[-1] if leaf.ndim else 1)
        # A matrix-vector product runs at the speed of memory, which XLA's reductions on CPU do not;
        # the barrier keeps it from being simplified away.
        return (rows @ jax.lax.optimization_barrier(jnp.zeros(rows.shape[1], leaf.dtype))).sum()

    return jnp.stack([spread(leaf) == 0 for leaf in leaves]).all()


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


def read_batch(data: ClientData, width: int, place: Array, order: Array | None = None) -> Batch:
    """Read the batch at a place of an epoch, in an order [n] of the client's rows or as they stand."""
    places = place * width + jnp.arange(width, dtype=jnp.int32)
    rows = jnp.minimum(places, room(data) - 1)
    rows = rows if order is None else order[rows]
    take = lambda leaf: leaf.at[rows].get(mode="promise_in_bounds")  # an order holds rows only
    return Batch(jax.tree.map(take, data.examples), places < data.num_examples)


def _draw_order(budget: Budget, key: Array, data: ClientData, epoch: Array) -> Array:
    """Draw the order [n] in which an epoch reads a client's rows; padding rows come last."""
    rows = jnp.arange(room(data), dtype=jnp.int32)
    if not budget.shuffle:
        return rows
    draws = jax.random.uniform(jax.random.fold_in(key, epoch), rows.shape)
    return jnp.argsort(jnp.where(rows < data.num_examples, draws, 2.0)).astype(jnp.int32)


def run_steps(
    budget: Budget,
    key: Array,
    data: ClientData,
    carry: PyTree,
    step_fn: StepFn,
    *,
    times: Array | None = None,
) -> tuple[PyTree, dict[str, Array]]:
    """Run one client's steps of one round: -> (carry, means of the metrics over its steps).

    The loop ends where the client's own batches end, so a batch of clients costs as many steps as the
    longest of them. The means carry `steps` with them. `times`, i32[], multiplies a budget of steps; one
    of epochs means as many whatever it is.
    """
    order_key, step_key = jax.random.split(key)
    draw = functools.partial(_draw_order, budget, order_key, data)
    per_epoch = jnp.maximum(-(-data.num_examples // budget.batch_size), 1)
    num_steps = count_steps(budget, data.num_examples)
    if times is not None and budget.steps is not None:
        num_steps = num_steps * times

    # Examples are sorted once an epoch, not at every step. How many epochs a budget of steps has is not
    # known before it runs: its order goes from step to step.
    if budget.epochs is not None:
        orders = jax.vmap(draw)(jnp.arange(budget.epochs, dtype=jnp.int32))
        next_order = lambda order, epoch, place: orders[epoch]
    else:
        next_order = lambda order, epoch, place: jax.lax.cond(
            place == 0, draw, lambda _: order, epoch
        )

    @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for the loop
    def one_step(step: Array, order: Array, carry: PyTree) -> tuple[PyTree, Metrics]:
        batch = read_batch(data, budget.batch_size, step % per_epoch, order)
        return step_fn(carry, batch, jax.random.fold_in(step_key, step), step, num_steps)

    zero, rows = jnp.zeros((), jnp.int32), jnp.arange(room(data), dtype=jnp.int32)
    shapes = jax.eval_shape(one_step, zero, rows, carry)[1]
    floats = lambda dtype: jnp.float32 if jnp.issubdtype(dtype, jnp.bool_) else dtype
    wide = lambda dtype: at_least_float32(floats(dtype))
    sums = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf.dtype)), shapes)

    def body(step: Array, state: tuple[Array, PyTree, Metrics]) -> tuple[Array, PyTree, Metrics]:
        order, carry, sums = state
        order = next_order(order, step // per_epoch, step % per_epoch)
        carry, metrics = one_step(step, order, carry)
        add = lambda total, value: total + value.astype(total.dtype)
        return order, carry, jax.tree.map(add, sums, metrics)

    _, carry, sums = jax.lax.fori_loop(zero, num_steps, body, (rows, carry, sums))
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


def check_optimizer(optimizer: optax.GradientTransformation, *, has_rate: bool = False) -> None:
    """Refuse an optimiser that would climb: with a rate of its own where none is due, or without one.

    Optax's optimisers with a rate step down the gradient, those without one give a step that is yet to be
    taken off.
    """
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        params = jnp.zeros((2, 2))

        def step(grads: Array) -> Any:
            return optimizer.update(grads, optimizer.init(params), params)[0]

        try:  # of two steps, so that what does not follow the gradient (noise) drops out
            along = float(jnp.sum(step(params + 1) - step(params - 1)))
        except Exception:  # made for a certain tree of parameters: it cannot be asked here
            return
    if along < 0 and not has_rate:
        raise FederationError(
            "optimizer: has a learning rate of its own, with which training would climb; give a "
            "transformation without one (optax.scale_by_adam(), not optax.adam(rate)), and the rate as "
            "learning_rate"
        )
    if along > 0 and has_rate:
        raise FederationError(
            "server_optimizer: the transformation has no learning rate, so that the server would climb; "
            "give one that has (optax.adam(rate), not optax.scale_by_adam())"
        )


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

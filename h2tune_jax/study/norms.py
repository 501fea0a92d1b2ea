"""Full-batch gradient norms of the shared and the personal parts of a federation.

With f_i(G, v_i) the mean loss of client i on all its examples, at the model that it has right after
download, and F = 1/N sum_i f_i over all N clients of all cohorts, a state has

    shared    |grad_G F|^2
    personal  1/N sum_i |grad_{v_i} f_i|^2

Both come from differentiating through the method's own `broadcast` and `adapters`, so they are those of
the objective that the method's clients see, whatever the method. G is what `FederatedMethod.shared`
names on the server; v_i is whatever else of a client's state reaches its model.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.adapters import relation
from h2tune_jax.check import check_cohorts, check_federation, named_errors
from h2tune_jax.method import FederatedMethod
from h2tune_jax.training import read_batch, room, trim
from h2tune_jax.types import (
    Array,
    ClientData,
    CohortSpec,
    Download,
    FederationError,
    PyTree,
    RoundState,
    Specs,
)

TrainedFn = Callable[[CohortSpec, PyTree, PyTree], PyTree]
"""(spec, client, gradient) -> the gradient where the method trains, zero where it holds still."""


class Norms(NamedTuple):
    """One state's gradients and objective, all scalars."""

    shared: Array  # |grad_G F|^2
    personal: Array  # 1/N sum_i |grad_{v_i} f_i|^2
    loss: Array  # F
    scale: Array  # |G|^2


class Gradients(NamedTuple):
    """One client's full-batch gradients at the moment of download."""

    shared: PyTree  # of f_i, like the shared fields of the server, by name
    personal: PyTree  # of f_i, like the client; zero where the method does not train
    loss: Array  # f_i


def everything(spec: CohortSpec, client: PyTree, gradient: PyTree) -> PyTree:
    """Count every parameter that reaches the model as trained."""
    del spec, client
    return gradient


def h2tune_trained(
    *, upload: str = "gradient", train_factors: bool = True, train_relation: bool = True
) -> TrainedFn:
    """Say what H2Tune trains: P on its support only (not at all under `transpose`), and P, A and B if
    told to.
    """
    trains_relation = train_relation and upload == "gradient"

    def trained(spec: CohortSpec, client, gradient):
        del spec
        moves = relation.support(client.relation) & trains_relation
        own = jnp.where(moves, gradient.relation, jnp.zeros_like(gradient.relation))
        gradient = gradient._replace(relation=own)
        if not train_factors:
            still = jax.tree.map(jnp.zeros_like, (gradient.a, gradient.b))
            gradient = gradient._replace(a=still[0], b=still[1])
        return gradient

    return trained


def client_gradients(
    method: FederatedMethod,
    specs: Specs,
    cohort: int,
    state: RoundState,
    base: PyTree,
    client_id: Array,  # i32[]
    client: PyTree,  # one client, without C
    data: ClientData,  # of one client
    *,
    rows: int,
    trained_fn: TrainedFn = everything,
) -> Gradients:
    """Differentiate one client's f_i, over all its examples, `rows` of them at a time.

    A batch weighs by its examples, as in `make_evaluate`. Loss functions get `key=None`.
    """
    spec, data = specs[cohort], trim(data)
    fields = _shared_fields(method)
    leaves, treedef = jax.tree.flatten(client)
    moving = [place for place, leaf in enumerate(leaves) if _is_float(leaf)]
    num_examples = jnp.maximum(data.num_examples, 1).astype(jnp.float32)

    def objective(shared: dict, own: list, step: Array) -> Array:
        server = state.server._replace(**shared) if fields else state.server
        whole = list(leaves)
        for place, leaf in zip(moving, own):
            whole[place] = leaf
        ids = tuple(
            (client_id if place == cohort else jnp.zeros((), jnp.int32))[None][: place == cohort]
            for place in range(len(specs))
        )
        common, personal = method.broadcast(specs, jax.random.key(0), server, ids, state.round)[
            cohort
        ]
        download = Download(common, jax.tree.map(lambda leaf: leaf[0], personal))
        adapters = method.adapters(spec, server, treedef.unflatten(whole), download)
        batch = read_batch(data, rows, step)
        loss, _ = spec.loss_fn(adapters, base, batch, None)
        # The reader begins again after a client's last batch: what it reads then does not count.
        own_rows = step * rows < data.num_examples
        count = jnp.where(own_rows, batch.mask.sum(), 0).astype(jnp.float32)
        share = (count / num_examples).astype(loss.dtype)
        return jnp.where(count > 0, loss * share, jnp.zeros_like(loss))

    start = {field: getattr(state.server, field) for field in fields}
    args = start, [leaves[place] for place in moving]

    def add(total, step):
        loss, grads = jax.value_and_grad(objective, argnums=(0, 1))(*args, step)
        return jax.tree.map(jnp.add, total, (loss, grads)), None

    steps = jnp.arange(-(-room(data) // rows), dtype=jnp.int32)
    shapes = jax.eval_shape(lambda: add((jnp.zeros(()), args), steps[0])[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (loss, (of_shared, of_own)), _ = jax.lax.scan(add, zeros, steps)

    whole = [jnp.zeros_like(leaf) for leaf in leaves]
    for place, leaf in zip(moving, of_own):
        whole[place] = leaf
    return Gradients(of_shared, trained_fn(spec, client, treedef.unflatten(whole)), loss)


def make_norms(
    method: FederatedMethod,
    specs: Specs,
    *,
    rows: int,
    chunk: int | None = None,
    trained_fn: TrainedFn = everything,
) -> Callable[[RoundState, tuple, tuple], Norms]:
    """Build `norms(state, bases, data) -> Norms`, a pure function that may be jitted and vmapped.

    Args:
      method: whose state it is.
      specs: the cohorts; every client counts alike.
      rows: how many examples of a client are differentiated at once.
      chunk: how many clients at once; None: all of a cohort. Only one chunk's gradients exist at a
        time, beside the one sum of the shared part.
      trained_fn: which personal parameters the method trains (`h2tune_trained` for H2Tune).
    """
    check_federation(method, specs, None)
    fields = _shared_fields(method)
    num_clients = sum(spec.num_clients for spec in specs)

    def norms(state: RoundState, bases: tuple, data: tuple) -> Norms:
        check_cohorts(specs, bases=bases, data=data, clients=state.clients)
        shared = {field: getattr(state.server, field) for field in fields}
        total = jax.tree.map(jnp.zeros_like, shared)
        personal = loss = jnp.zeros((), jnp.float32)
        for place, spec in enumerate(specs):
            size = min(chunk or spec.num_clients, spec.num_clients)
            padded = -(-spec.num_clients // size) * size
            order = jnp.arange(padded, dtype=jnp.int32)
            counts = order < spec.num_clients
            ids = jnp.where(counts, order, 0)  # the first stands in again, and does not count

            def one(client_id, place=place):
                take = lambda tree: jax.tree.map(lambda leaf: leaf[client_id], tree)
                seen = client_gradients(
                    method, specs, place, state, bases[place], client_id,
                    take(state.clients[place]), ClientData(*take(tuple(data[place]))),
                    rows=rows, trained_fn=trained_fn,
                )  # fmt: skip
                return seen.shared, square_norm(seen.personal), _f32(seen.loss)

            def visit(carry, x, one=one):
                ids, counts = x

                def add(sums, leaf):
                    where = counts.reshape((-1,) + (1,) * (leaf.ndim - 1))
                    return sums + jnp.where(where, leaf, jnp.zeros_like(leaf)).sum(axis=0)

                return jax.tree.map(add, carry, jax.vmap(one)(ids)), None

            chunks = (ids.reshape(-1, size), counts.reshape(-1, size))
            with named_errors(spec, "gradient norms"):
                (total, personal, loss), _ = jax.lax.scan(visit, (total, personal, loss), chunks)
        return Norms(
            shared=square_norm(total) / num_clients**2,
            personal=personal / num_clients,
            loss=loss / num_clients,
            scale=square_norm(shared),
        )

    return norms


def square_norm(tree: PyTree) -> Array:  # f32[]
    """Sum the squares of all floating leaves."""
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree):
        if _is_float(leaf):
            total = total + jnp.square(_f32(leaf)).sum()
    return total


def _shared_fields(method: FederatedMethod) -> tuple[str, ...]:
    if method.shared == ():
        raise FederationError(
            f"gradient norms: {method.name!r} shares something that is no field of its server's state; "
            "study the method without the wrapper that hides it"
        )
    return method.shared or ()


def _is_float(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _f32(leaf: Array) -> Array:
    return leaf if leaf.dtype == jnp.float64 else leaf.astype(jnp.float32)

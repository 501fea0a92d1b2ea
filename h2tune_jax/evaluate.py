"""Evaluation of every client on its own data, at the moments that a comparison names."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from h2tune_jax.check import check_choice, check_clients, check_cohorts, named_errors
from h2tune_jax.method import FederatedMethod
from h2tune_jax.round import ClientAxis, resolve_axis
from h2tune_jax.training import count_steps, read_batch, room, scalar_metrics, trim
from h2tune_jax.types import (
    Adapters,
    Array,
    Budget,
    ClientData,
    CohortSpec,
    Download,
    PyTree,
    RoundState,
    Specs,
)


def make_evaluate(
    method: FederatedMethod,
    specs: Specs,
    *,
    batch_size: int,
    moment: str = "trained",
    client_axis: ClientAxis = "auto",
) -> Callable[..., dict[str, dict[str, Array]]]:
    """Build the jitted `evaluate(state, bases, data, client_ids=None) -> metrics by cohort`, each [C].

    With `client_ids`, i32[S] a cohort, `state.clients` and `data` hold those clients only, in that
    order, and the metrics are [S]; a cohort with i32[0] is left out.
    Every client's loss and scalar metrics are averaged over its own examples (a batch weighs by its
    examples); of a client without examples they are NaN. Loss functions get `key=None`, which asks for no
    dropout.

    Args:
      method: the method whose adapters are evaluated.
      specs: the cohorts.
      batch_size: how many examples are evaluated at once.
      moment: "trained" (as local training left the client) or "downloaded" (right after it receives
        the server's present state, before any training).
      client_axis: as in `make_round`.
    """
    check_choice("moment", moment, ("trained", "downloaded"))
    axis = resolve_axis(client_axis)
    budget = Budget(batch_size=batch_size, epochs=1, shuffle=False)

    def evaluate(
        state: RoundState, bases: tuple, data: tuple, client_ids: tuple | None = None
    ) -> dict[str, dict[str, Array]]:
        check_cohorts(specs, bases=bases, data=data, clients=state.clients)
        ids = tuple(jnp.arange(spec.num_clients, dtype=jnp.int32) for spec in specs)
        ids = ids if client_ids is None else client_ids
        check_cohorts(specs, client_ids=ids)
        downloads = method.broadcast(specs, jax.random.key(0), state.server, ids, state.round)
        results = {}
        for spec, base, named, clients, rows, download in zip(
            specs, bases, ids, state.clients, data, downloads
        ):
            if named.shape[0] == 0:
                continue
            check_clients(spec, named.shape[0], rows, clients)

            def one(args, spec=spec, base=base, common=download.common):
                client, own_data, personal = args
                sent = Download(common, personal) if moment == "downloaded" else None
                adapters = method.adapters(spec, state.server, client, sent)
                return _mean_metrics(spec, adapters, base, trim(ClientData(*own_data)), budget)

            with named_errors(spec, "evaluate"):
                args = clients, rows, download.personal
                if axis == "vmap":
                    results[spec.name] = jax.vmap(one)(args)
                else:
                    size = 1 if axis == "scan" else int(axis)
                    results[spec.name] = jax.lax.map(
                        one, args, batch_size=None if size == 1 else size
                    )
        return results

    return jax.jit(evaluate)


def _mean_metrics(
    spec: CohortSpec, adapters: Adapters, base: PyTree, data: ClientData, budget: Budget
) -> dict[str, Array]:
    """Average over one client's own examples; over none at all a mean is NaN.

    The loop ends where the client's own batches end, as that of `run_steps` does.
    """

    @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for the loop
    def weighted(step: Array) -> dict[str, Array]:
        batch = read_batch(data, budget.batch_size, step)
        loss, metrics = spec.loss_fn(adapters, base, batch, None)
        seen = {**scalar_metrics(f"cohort {spec.name!r}", metrics), "loss": loss}
        count = batch.mask.sum().astype(jnp.float32)
        return jax.tree.map(lambda value: value.astype(jnp.float32) * count, seen)

    zero = jnp.zeros((), jnp.int32)
    # Summed when all are there: a running sum could be contracted with the product, and round otherwise.
    parts = jax.tree.map(
        lambda _: jnp.zeros(-(-room(data) // budget.batch_size), jnp.float32),
        jax.eval_shape(weighted, zero),
    )

    def body(step: Array, parts: dict[str, Array]) -> dict[str, Array]:
        return jax.tree.map(lambda row, part: row.at[step].set(part), parts, weighted(step))

    parts = jax.lax.fori_loop(zero, count_steps(budget, data.num_examples), body, parts)
    examples = data.num_examples.astype(jnp.float32)
    return jax.tree.map(lambda row: row.sum() / examples, parts)

"""Fed-HeLLo (Zhang et al., TNNLS 2025, arXiv 2506.12213): which layers a client trains, by their weight.

Clients of one model train subsets of its LoRA layers; client i can afford n_i of them. Allocation is drawn
anew every round:

- `fim`: by a Fisher score a layer on a small server set (`fisher.py`), clustered into three groups with
  weights 1, 2, 3; drawn without replacement.
- `gd`: by a fixed shape over depth; a client takes the n_i layers that the shape ranks first.
- `rgd`: the shape's weights as chances, drawn without replacement.
- `combined`: `rgd` until Fisher scores exist, `fim` after.

The server then adds, per layer, the mean of how it moved at those who trained it (`layer_subsets.py`).

Departures and readings: the public code leaves it to chance which cluster gets which weight, here the
highest gets 3. Its shapes but for the bottleneck of 12 layers are our reading (`allocation.py`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from h2tune_jax import aggregate
from h2tune_jax.check import check_choice, check_whole, named_errors
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.fed_hello.allocation import (
    SHAPES,
    group_weights,
    shape_order,
    shape_weights,
)
from h2tune_jax.methods.fed_hello.fisher import TARGETS, layer_scores
from h2tune_jax.methods.layer_subsets import LayerServer, draw_layers, head_name, layer_subsets
from h2tune_jax.methods.lora import Training
from h2tune_jax.training import Schedule
from h2tune_jax.types import Array, CohortSpec, FederationError, PyTree, Specs

ALLOCATIONS = ("fim", "gd", "rgd", "combined")


class Account(NamedTuple):
    """What an architecture's layers are known to matter."""

    scores: Array  # f32[Li]
    known: Array  # bool[]


def fed_hello(
    *,
    allocation: str = "rgd",
    shape: str = "bottleneck",
    budgets: Mapping[str, int] | None = None,
    heads: str = "personal",
    server_set: tuple | None = None,
    fisher: str = "logit",
    fim_every: int = 5,
    fim_warmup: int = 5,
    learning_rate: float = 1e-3,
    head_rate: float | None = None,
    weight_decay: float = 0.0,
    optimizer: optax.GradientTransformation | None = None,
    schedule: Schedule | None = None,
) -> FederatedMethod:
    """Build Fed-HeLLo. The options that are not named here are those of `local`.

    Cohorts of one architecture need equal ranks; they differ by how many layers they train.

    Args:
      allocation: "fim", "gd", "rgd" or "combined".
      shape: of `gd`, `rgd` and the beginning of `combined`: "triangle" (most at the input),
        "inverted_triangle", "bottleneck" (least in the middle) or "uniform".
      budgets: cohort -> how many layers its clients train a round; half of them, rounded up, for
        cohorts that it does not name.
      heads: "personal", or "shared" between cohorts of an architecture with the same `init_head_fn`.
        `fim` and `combined` need shared heads, where there are any: the server's Fisher has no other.
      server_set: the server's labelled examples for `fim` and `combined`, a tuple of one entry a cohort:
        leaves [n, ...] as its loss function reads them, or None (each architecture needs one). If None,
        the `probe` given to each round is taken for it.
      fisher: whose gradient is squared: "logit" (the true label's, as in the public code) or
        "log_likelihood".
      fim_every: rounds between two scorings.
      fim_warmup: rounds before the first.
    """
    training = Training(learning_rate, head_rate, weight_decay, optimizer, "restart", schedule)
    check_choice("allocation", allocation, ALLOCATIONS)
    check_choice("shape", shape, SHAPES)
    check_choice("fisher", fisher, TARGETS)
    check_whole("fim_every", fim_every)
    check_whole("fim_warmup", fim_warmup)
    scored = allocation in ("fim", "combined")

    def check(specs: Specs) -> None:
        for spec in specs:
            if scored and heads == "personal" and spec.init_head_fn is not None:
                raise FederationError(
                    f"cohort {spec.name!r}: allocation {allocation!r} needs heads='shared': the server "
                    "cannot score layers without a task head"
                )

    def account(spec: CohortSpec) -> Any:
        if not scored:
            return ()
        return Account(jnp.zeros(spec.model.num_layers, jnp.float32), jnp.zeros((), bool))

    def allocate(spec: CohortSpec, account: Any, key: Array, count: int) -> Array:
        layers = spec.model.num_layers
        if allocation == "gd":
            return jnp.sort(jnp.asarray(shape_order(shape, layers)[:count], jnp.int32))
        if allocation == "fim":
            weights = jnp.full(layers, 1 / layers, jnp.float32)
        else:
            weights = jnp.asarray(shape_weights(shape, layers), jnp.float32)
        if scored:
            weights = jnp.where(account.known, group_weights(account.scores), weights)
        return draw_layers(key, weights, count)

    def refresh(
        specs: Specs, server: LayerServer, bases: tuple, probe: PyTree, round_index: Array
    ) -> dict[str, Any]:
        """Score the layers anew, in the rounds in which it is time for that."""
        sets = probe if server_set is None else server_set
        if not isinstance(sets, tuple) or len(sets) != len(specs):
            raise FederationError(
                f"allocation {allocation!r} needs a small labelled server set, as a tuple of one entry a "
                f"cohort ({len(specs)}): the option server_set, or probe= of the round"
            )
        done = round_index + 1 - fim_warmup
        due = (done >= 0) & (done % fim_every == 0)
        accounts = {}
        for own, group in aggregate.architectures(specs).items():
            places = [place for place in group if sets[place] is not None]
            if not places:
                raise FederationError(
                    f"cohort {specs[group[0]].name!r}: no server set for it or its like"
                )

            def score(old: Account, own=own, places=places) -> Account:
                scores = []
                for place in places:
                    spec, head = specs[place], server.heads.get(head_name(specs, specs[place]))
                    examples = jax.tree.map(jnp.asarray, sets[place])
                    with named_errors(spec, "server set"):
                        scores.append(
                            layer_scores(
                                spec, bases[place], server.factors[own], head, examples, fisher
                            )
                        )
                mean = sum(scores[1:], scores[0]) / len(scores)
                fine = jnp.isfinite(mean).all()
                return Account(jnp.where(fine, mean, old.scores), old.known | fine)

            accounts[own] = jax.lax.cond(due, score, lambda old: old, server.accounts[own])
        return accounts

    return layer_subsets(
        "fed_hello",
        training,
        budgets=budgets,
        heads=heads,
        allocate_fn=allocate,
        account=account,
        refresh_fn=refresh if scored else None,
        further_check=check,
    )

"""Whole runs of T rounds as one compiled program: over all seeds and step constants, for every T.

The loop over rounds has a traced bound, so that one program serves every horizon.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.check import check_choice
from h2tune_jax.method import FederatedMethod
from h2tune_jax.round import init_round, make_round
from h2tune_jax.study.norms import Norms, TrainedFn, everything, make_norms
from h2tune_jax.study.problem import Problem
from h2tune_jax.types import Array, CohortSpec, FederationError, PyTree, RoundState

BINS = 20
"""Rounds are binned by powers of two: bin k holds rounds 2^k - 1 up to, not including, 2^(k+1) - 1."""

Parts = tuple[PyTree, ...]
"""(server, clients) of a `RoundState`: runs are mapped over with one common round number."""

HyperFn = Callable[[Any, Array], Any]
"""(the method's `hyper`, the step size) -> the `hyper` of a round."""

STEP_RULES = ("sqrt", "constant", "inverse", "decreasing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRule:
    """The step size of round t of T, by its constant c.

    sqrt: c / sqrt T, the theorem's; constant: c; inverse: c / T; decreasing: c / (t + offset), t from 0.
    """

    kind: str = "sqrt"
    offset: float = 1.0

    def __post_init__(self):
        check_choice("step rule", self.kind, STEP_RULES)

    def rate(self, constant, round_index, horizon):
        """Return the step size; floats, numpy or jax arrays."""
        if self.kind == "sqrt":
            return constant / horizon**0.5
        if self.kind == "inverse":
            return constant / horizon
        if self.kind == "decreasing":
            return constant / (round_index + self.offset)
        return constant + 0 * horizon


class Outcome(NamedTuple):
    """What runs gave, leaves [runs] or [runs, BINS]."""

    mean: Norms  # over the states at the start of rounds 0 ... T-1
    last: Norms  # of the state after T rounds
    binned: Norms  # means over the rounds of each bin; nan in bins beyond T
    rejected: Array  # i32[runs], client results that were not finite


def make_horizon(
    method: FederatedMethod,
    problem: Problem,
    *,
    step: StepRule = StepRule(),
    participation: float = 1.0,
    trained_fn: TrainedFn = everything,
    chunk: int | None = None,
    hyper_fn: HyperFn | None = None,
) -> Callable[[int, Any, Any], Outcome]:
    """Build `run(horizon, constants [runs], seeds u32[runs]) -> Outcome`, compiled once for all horizons.

    A seed decides a run's start, its order of examples, its noise and who takes part; the problem is the
    same for all.

    Args:
      method, problem: what is run on what.
      step: the step size of a round.
      participation: the share of each cohort that takes part in a round (rounded, one client at least),
        drawn afresh from seed and round.
      trained_fn, chunk: as in `make_norms`.
      hyper_fn: how the step size enters the method's settings; None: `set_rates`.
    """
    if not 0 < participation <= 1:
        raise FederationError(f"participation: must lie in (0, 1], got {participation}")
    specs = problem.specs
    round_fn = make_round(method, specs, client_axis="vmap", donate=False)
    hyper_fn = set_rates if hyper_fn is None else hyper_fn
    norms_fn = make_norms(method, specs, rows=problem.rows, chunk=chunk, trained_fn=trained_fn)

    def one_round(fixed: tuple, parts: Parts, rate: Array, seed: Array, round_index: Array):
        ids = _participants(specs, participation, seed, round_index)
        state = RoundState(round_index, parts[0], parts[1])
        hyper = hyper_fn(method.hyper, rate)
        state, metrics = round_fn(state, *fixed, ids, None, hyper, seed)
        rejected = functools.reduce(jnp.add, metrics.rejected.values())
        return (state.server, state.clients), rejected

    def some(horizon: Array, constants: Array, seeds: Array, fixed: tuple) -> Outcome:
        """Run as many runs as there are constants, all at once. `fixed`: bases and data."""
        begin = lambda seed: init_round(method, specs, fixed[0], None, jax.random.key(seed))
        parts = tuple(jax.vmap(begin)(seeds))[1:]
        floats = constants.dtype

        def body(round_index: Array, carry):
            parts, _, binned, rejected = carry
            counts = round_index < horizon
            measure = lambda parts: norms_fn(RoundState(round_index, parts[0], parts[1]), *fixed)
            seen = jax.vmap(measure)(parts)
            place = _bin(round_index)
            add = lambda sums, new: sums.at[:, place].add(jnp.where(counts, new, 0))
            rates = step.rate(constants, round_index.astype(floats), horizon.astype(floats))
            advance = lambda parts, rate, seed: one_round(fixed, parts, rate, seed, round_index)
            parts, refused = jax.vmap(advance)(parts, rates, seeds)
            rejected = rejected + jnp.where(counts, refused, 0)
            return parts, seen, jax.tree.map(add, binned, seen), rejected

        runs = constants.shape[0]
        none = Norms(*(jnp.zeros(runs, jnp.float32),) * len(Norms._fields))
        binned = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape, BINS), leaf.dtype), none)
        # One round more than asked, for the norms of the last state alone: what follows it is dropped.
        # A second copy of `norms_fn` after the loop would take as long again to compile.
        carry = parts, none, binned, jnp.zeros(runs, jnp.int32)
        _, last, binned, rejected = jax.lax.fori_loop(0, horizon + 1, body, carry)
        counts = _bin_counts(horizon)
        each = lambda sums: jnp.where(
            (counts > 0)[None, :], sums / jnp.maximum(counts, 1)[None, :], jnp.nan
        )
        return Outcome(
            mean=jax.tree.map(lambda sums: sums.sum(axis=1) / horizon.astype(sums.dtype), binned),
            last=last,
            binned=jax.tree.map(each, binned),
            rejected=rejected,
        )

    def all_runs(horizon: Array, constants: Array, seeds: Array, fixed: tuple) -> Outcome:
        runs = constants.shape[0]
        most = min(problem.runs_at_once or runs, runs)
        size = max(size for size in range(1, most + 1) if runs % size == 0)
        parts = constants.reshape(-1, size), seeds.reshape(-1, size)
        out = jax.lax.map(lambda part: some(horizon, part[0], part[1], fixed), parts)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)

    program = jax.jit(all_runs)

    def run(horizon: int, constants, seeds) -> Outcome:
        return program(
            jnp.asarray(horizon, jnp.int32),
            jnp.asarray(constants, jnp.float32),
            jnp.asarray(seeds, jnp.uint32),
            (problem.bases, problem.data),
        )

    return run


def set_rates(hyper: Any, rate: Array) -> Any:
    """Give every field whose name ends in "rate" the step size."""
    return hyper._replace(**{name: rate for name in hyper._fields if name.endswith("rate")})


def _participants(
    specs: tuple[CohortSpec, ...], share: float, seed: Array, round_index: Array
) -> tuple[Array, ...] | None:
    if share == 1:
        return None
    key = jax.random.fold_in(jax.random.key(seed ^ jnp.uint32(0x5EED)), round_index)
    chosen = []
    for place, spec in enumerate(specs):
        order = jax.random.permutation(jax.random.fold_in(key, place), spec.num_clients)
        chosen.append(order[: max(1, round(share * spec.num_clients))].astype(jnp.int32))
    return tuple(chosen)


def _bin(round_index: Array) -> Array:
    """The bin of a round: floor(log2(round + 1)), in whole numbers."""
    return 31 - jax.lax.clz((round_index + 1).astype(jnp.int32))


def _bin_counts(horizon: Array) -> Array:  # f32[BINS]
    first = 2 ** jnp.arange(BINS, dtype=jnp.int32) - 1
    return (jnp.minimum(2 * first + 1, horizon) - first).clip(0).astype(jnp.float32)

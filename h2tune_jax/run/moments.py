"""Tests of clients at the moments that a comparison names; nothing of the run is changed by them.

"trained": as local training left the client. "downloaded": right after it receives the server's present
state. "newcomers": clients that never train in the run start, download, train for a stated number of
steps, and are tested; all on a copy.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax.run.feed import Feed
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.records import plain
from h2tune_jax.run.sampling import Participants
from h2tune_jax.run.settings import EvaluationConfig
from h2tune_jax.run.store import Store
from h2tune_jax.types import ClientData, PyTree, RoundState

WIDTH = 32
"""So many clients at most are tested by one call."""

Tests = dict[str, dict[str, dict[str, Any]]]
"""moment -> cohort -> metric -> chunks of values, still on the device."""


class Tested(NamedTuple):
    """The clients of a run that are tested, by cohort."""

    clients: Participants
    newcomers: Participants | None


def run_tests(
    programs: Programs,
    evaluation: EvaluationConfig,
    store: Store,
    round_index: Any,
    server: PyTree,
    tested: Tested,
    test: Feed,
    train: Feed,
) -> Tests:
    """Hand the tests to the device; `train` has the newcomers' data."""
    results: Tests = {moment: {} for moment in evaluation.moments}
    if tested.newcomers is not None and evaluation.newcomers is not None:
        results["newcomers"] = {}
    waiting: list[Any] = []
    for cohort, spec in enumerate(programs.specs):

        def call(moment, ids, clients, spec=spec, cohort=cohort):
            """Test the clients of one cohort: the programs leave out those of the others."""
            fill = lambda own: tuple(
                own if i == cohort else None for i in range(len(programs.specs))
            )
            state = RoundState(round_index, server, fill(clients))
            named = tuple(ids if i == cohort else ids[:0] for i in range(len(programs.specs)))
            data = fill(test.take(cohort, ids))
            found = programs.evaluate(moment)(state, programs.bases, data, named)[spec.name]
            waiting.append(found)
            if len(waiting) > 2:  # no more clients than these lie on the device for a test
                jax.block_until_ready(waiting.pop(0))
            return found

        ids = tested.clients[cohort]
        for part, count in _chunks(ids):
            clients = store.look(server, cohort, part)
            for moment in evaluation.moments:
                found = call(moment, part, clients)
                _add(results[moment], spec.name, part, count, found)
        if tested.newcomers is None or evaluation.newcomers is None:
            continue
        for part, count in _chunks(tested.newcomers[cohort]):
            clients = store.look(server, cohort, part)
            clients = _adapt(
                programs,
                evaluation.newcomers.steps,
                RoundState(round_index, server, ()),
                cohort,
                part,
                clients,
                train.take(cohort, part),
            )
            found = call("trained", part, clients)
            _add(results["newcomers"], spec.name, part, count, found)
    return results


def _chunks(ids: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Split ids into as few chunks of one width as may be: (ids, how many of them count)."""
    if not len(ids):
        return []
    number = -(-len(ids) // WIDTH)
    width = -(-len(ids) // number)
    padded = np.resize(ids, number * width).astype(np.int32)
    return [(padded[i : i + width], min(width, len(ids) - i)) for i in range(0, len(padded), width)]


def _add(found: dict, name: str, ids: np.ndarray, count: int, values: dict[str, Any]) -> None:
    into = found.setdefault(name, {"clients": []})
    into["clients"].append((ids, count))
    for metric, chunk in values.items():
        into.setdefault(metric, []).append((chunk, count))


def _adapt(
    programs: Programs,
    steps: int,
    state: RoundState,
    cohort: int,
    ids: np.ndarray,
    clients: PyTree,
    data: ClientData,
) -> PyTree:
    """Train clients of one cohort by themselves: what the server would make of it is dropped."""
    shapes = programs.client_shapes(state.server)
    all_ids, all_clients, all_data = [], [], []
    for i, client in enumerate(shapes):
        if i == cohort:
            all_ids.append(ids)
            all_clients.append(clients)
            all_data.append(data)
        else:
            nobody = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), client)
            all_ids.append(ids[:0])
            all_clients.append(nobody)
            all_data.append(jax.tree.map(lambda leaf: leaf[:0], data))
    after, _ = programs.adapt(steps)(
        state._replace(clients=tuple(all_clients)),
        programs.bases,
        tuple(all_data),
        tuple(all_ids),
        None,
        programs.method.hyper,
        programs.seed,
        programs.probe,
    )
    return after.clients[cohort]


def read_tests(results: Tests) -> dict[str, Any]:
    """Wait for the tests, and return them as a record holds them."""
    return {
        moment: {
            name: {
                metric: plain(np.concatenate([np.asarray(part)[:count] for part, count in chunks]))
                for metric, chunks in values.items()
            }
            for name, values in cohorts.items()
        }
        for moment, cohorts in results.items()
    }


def score(record: dict[str, Any], metric: str, moment: str) -> float | None:
    """Return the mean over groups of a metric's mean over clients; None where it was not measured."""
    means = []
    for values in record.get("evaluation", {}).get(moment, {}).values():
        known = [value for value in values.get(metric, ()) if value is not None]
        if not known:
            return None
        means.append(sum(known) / len(known))
    return sum(means) / len(means) if means else None


def last_means(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return the means over clients of the last test: by moment, group and metric."""
    tests = next((r["evaluation"] for r in reversed(records) if "evaluation" in r), {})

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return {
        moment: {
            name: {metric: mean(v) for metric, v in values.items() if metric != "clients"}
            for name, values in cohorts.items()
        }
        for moment, cohorts in tests.items()
    }

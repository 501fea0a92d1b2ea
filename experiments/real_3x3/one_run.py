"""One run of the bench: build the federation of a seed, train a row's method on it, measure."""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from plan_types import Row, Setting, fingerprint
from record import Run

import h2tune_jax as h2
from h2tune_jax.methods.h2tune import H2TuneClient
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.config import make_config
from h2tune_jax.run.federation import Federation, build_federation
from h2tune_jax.run.settings import MethodConfig

TEST_BATCH, TEST_ROWS = 50, 100  # at once, and in one call: a program serves validation and test
FEW_ROWS = 200  # of the test, for these moments that stand beside the one that counts:
FEW_SPLITS = ("downloaded", "newcomer")


class Programs(NamedTuple):
    """One row on one federation's shapes, compiled at most once: rates and seeds are arguments."""

    method: h2.FederatedMethod
    specs: tuple
    round_fn: Any
    evaluate: Mapping[str, Any]  # by moment
    row: Row
    newcomers: int


def federation_of(setting: Setting, row: Row, seed: int, bases: tuple | None) -> Federation:
    """Build a row's federation with the data of a seed; frozen weights are held once."""
    probe = row.probe or setting.probe
    server = [] if setting.server is None else [setting.server]
    config = make_config({
        "rounds": setting.rounds,
        "seed": seed,
        "method": {"name": "local"},
        "groups": [*setting.groups, *server],
        **({} if probe is None else {"probe": probe}),
    })  # fmt: skip
    made = build_federation(config)
    if server:
        made = with_server_set(made)
    return made if bases is None else made._replace(bases=bases)


def with_server_set(made: Federation) -> Federation:
    """Take the last group out: its client's training examples are the server's, given as the probe.

    They stand beside the first cohort, and serve all of its architecture.
    """
    examples = jax.tree.map(lambda leaf: leaf[0], made.train[-1].examples)
    parts = {name: value[:-1] for name, value in made._asdict().items() if name != "probe"}
    probe = (examples, *(None,) * (len(parts["specs"]) - 1))
    return Federation(**parts, probe=probe)


def method_of(row: Row) -> h2.FederatedMethod:
    """Build a row's method; options that are wrong or exclude each other are an error."""
    return build_method(MethodConfig(name=row.method, **row.options))


def specs_of(row: Row, specs: tuple) -> tuple:
    """Return the cohorts as a row has them."""
    if row.rank is None:
        return specs
    rank = row.rank
    return tuple(dataclasses.replace(s, rank=rank, alpha=s.scale * rank) for s in specs)


def programs_of(setting: Setting, row: Row, specs: tuple) -> Programs:
    """Build a row's programs."""
    method, specs = method_of(row), specs_of(row, specs)
    evaluate = {
        moment: h2.make_evaluate(method, specs, batch_size=TEST_BATCH, moment=moment)
        for moment in ("trained", "downloaded")
    }
    round_fn = h2.make_round(method, specs)
    return Programs(method, specs, round_fn, evaluate, row, setting.newcomers)


def with_rate(hyper: Any, rate: float) -> Any:
    """Set the learning rate; a shared part's own rate keeps its ratio to it, a head's its value."""
    factor = rate / hyper.learning_rate
    scaled = {
        name: value * factor
        for name, value in hyper._asdict().items()
        if name.endswith("rate") and name != "head_rate"
    }
    return hyper._replace(**{name: jnp.asarray(value) for name, value in scaled.items()})


def with_mean_heads(state: h2.RoundState) -> h2.RoundState:
    """Give every client the mean of all clients' heads, as a server that shares heads would."""
    heads = [client.params["head"] for client in state.clients]
    mean = jax.tree.map(lambda *leaves: jnp.concatenate(leaves).mean(axis=0), *heads)
    clients = []
    for client, head in zip(state.clients, heads):
        same = jax.tree.map(lambda one, own: jnp.broadcast_to(one[None], own.shape), mean, head)
        clients.append(client._replace(params={**client.params, "head": same}))
    return state._replace(clients=tuple(clients))


def without_core(client: H2TuneClient) -> H2TuneClient:
    """Set the core that a client has trained to zero: what is left is its own."""
    return client._replace(middle=jnp.zeros_like(client.middle))


def head_numbers(state: h2.RoundState) -> int:
    """Count the numbers of one client's head."""
    return sum(leaf[0].size for leaf in jax.tree.leaves(state.clients[0].params["head"]))


class Trained(NamedTuple):
    """A federation after its rounds. By cohort, for each client that took part:"""

    state: h2.RoundState
    travelled: Mapping[str, np.ndarray]  # [2, S], the numbers that it sent up and got, in all
    refused: Mapping[str, np.ndarray]  # [S], in how many rounds it was not finite


def train(
    programs: Programs, federation: Federation, rounds: int, rate: float, seed: int
) -> Trained:
    """Train all clients but the newcomers."""
    method, specs = programs.method, programs.specs
    state = h2.init_round(method, specs, federation.bases, federation.probe, jax.random.key(seed))
    heads = 0
    if programs.row.mean_heads:
        heads, state = head_numbers(state), with_mean_heads(state)
    travelled = {spec.name: np.zeros((2, len(ids))) for spec, ids in zip(specs, usual(programs))}
    refused = {name: np.zeros(counts.shape[1], int) for name, counts in travelled.items()}
    for _ in range(rounds):
        state, metrics = one_round(programs, federation, state, usual(programs), rate, seed)
        if programs.row.mean_heads:
            state = with_mean_heads(state)
        for name, seen in metrics.clients.items():
            refused[name] += ~np.asarray(seen["finite"])
            for place, way in enumerate(("numbers_up", "numbers_down")):
                travelled[name][place] += np.asarray(seen[way], float) + heads
    return Trained(state, travelled, refused)


Ids = tuple[np.ndarray, ...]  # i32[S] a cohort


def usual(programs: Programs) -> Ids:
    """Return the ids of all clients but the newcomers, who are the last."""
    return tuple(
        np.arange(s.num_clients - programs.newcomers, dtype=np.int32) for s in programs.specs
    )


def new(programs: Programs) -> Ids:
    """Return the newcomers' ids."""
    return tuple(
        np.arange(s.num_clients - programs.newcomers, s.num_clients, dtype=np.int32)
        for s in programs.specs
    )


def one_round(
    programs: Programs,
    federation: Federation,
    state: h2.RoundState,
    ids: Ids,
    rate: float,
    seed: int,
) -> tuple[h2.RoundState, Any]:
    """Run one round; where there are no newcomers, of all in order, which saves a gather."""
    return programs.round_fn(
        state, federation.bases, federation.train, ids if programs.newcomers else None, None,
        with_rate(programs.method.hyper, rate), np.uint32(seed), federation.probe,
    )  # fmt: skip


def measure(
    programs: Programs,
    federation: Federation,
    state: h2.RoundState,
    rows: tuple[h2.ClientData, ...],
    ids: Ids,
    moment: str,
) -> dict[str, dict[str, np.ndarray]]:
    """Evaluate some clients: -> metrics by cohort, each [S]."""
    cut = lambda tree, chosen: jax.tree.map(lambda leaf: leaf[chosen], tree)
    some = state._replace(clients=tuple(map(cut, state.clients, ids)))
    own = tuple(map(cut, rows, ids))
    totals = {spec.name: {} for spec in programs.specs}
    for first in range(0, max(int(data.num_examples.max()) for data in own), TEST_ROWS):
        part = tuple(some_rows(data, first, TEST_ROWS) for data in own)
        found = jax.device_get(programs.evaluate[moment](some, federation.bases, part, ids))
        for spec, data in zip(programs.specs, part):
            for name, means in found[spec.name].items():
                counts = np.asarray(data.num_examples)
                total = np.where(counts > 0, means, 0) * counts  # a mean over no rows is NaN
                totals[spec.name].setdefault(name, []).append(total)
    return {
        spec.name: {
            n: sum(parts) / np.asarray(data.num_examples) for n, parts in totals[spec.name].items()
        }
        for spec, data in zip(programs.specs, own)
    }


def lines_of(
    setting: Setting, programs: Programs, federation: Federation, run: Run
) -> list[dict[str, Any]]:
    """Do one run: -> its lines, one a client.

    On test rows other moments stand beside the one that counts, as splits of their own: the clients
    right after a download, newcomers after a round of their own, and clients without the core that they
    have trained.
    """
    began = time.perf_counter()
    state, travelled, refused = train(programs, federation, setting.rounds, run.rate, run.seed)
    rows = federation.test if run.split == "test" else federation.validation
    ids = usual(programs)
    few = tuple(some_rows(one, 0, FEW_ROWS) for one in rows)
    found = {run.split: measure(programs, federation, state, rows, ids, setting.moment)}
    if run.split == "test" and programs.row.method == "h2tune":
        bare = state._replace(clients=tuple(map(without_core, state.clients)))
        found["without"] = measure(programs, federation, bare, rows, ids, "trained")
    if run.split == "test" and setting.newcomers:
        found["downloaded"] = measure(programs, federation, state, few, ids, "downloaded")
        # They take the places of as many others, so that the round is the same program.
        late = tuple(
            np.concatenate([old[: len(old) - len(fresh)], fresh])
            for old, fresh in zip(ids, new(programs))
        )
        state, _ = one_round(programs, federation, state, late, run.rate, run.seed)
        found["newcomer"] = measure(programs, federation, state, few, new(programs), "trained")
    seconds = time.perf_counter() - began
    return [
        {
            "setting": setting.name, "row": run.row, "plan": fingerprint(setting, programs.row),
            "rate": run.rate, "seed": run.seed, "split": split, "round": setting.rounds,
            "client": f"{spec.name}/{client}",
            "examples": int(
                (few if split in FEW_SPLITS else rows)[cohort].num_examples[client]
            ),
            "accuracy": round(float(found[split][spec.name]["accuracy"][place]), 6),
            "loss": round(float(found[split][spec.name]["loss"][place]), 6),
            "refused": int(refused[spec.name][place]) if split == run.split else 0,
            "numbers_up": int(travelled[spec.name][0, place]) if split == run.split else 0,
            "numbers_down": int(travelled[spec.name][1, place]) if split == run.split else 0,
            "seconds": round(seconds, 1), "device": jax.devices()[0].device_kind,
            "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__,
        }
        for split in found
        for cohort, spec in enumerate(programs.specs)
        for place, client in enumerate((new(programs) if split == "newcomer" else ids)[cohort])
    ]  # fmt: skip


def some_rows(data: h2.ClientData, first: int, count: int) -> h2.ClientData:
    """Keep so many of every client's rows, from one on."""
    examples = jax.tree.map(lambda leaf: leaf[:, first : first + count], data.examples)
    return h2.ClientData(examples, jnp.clip(data.num_examples - first, 0, count))

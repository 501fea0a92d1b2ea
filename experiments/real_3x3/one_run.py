"""One run of the bench: build the federation of a seed, train a row's method on it, measure."""

import dataclasses
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from plan_types import Row, Setting
from record import Run

import h2tune_jax as h2
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.config import make_config
from h2tune_jax.run.federation import Federation, build_federation
from h2tune_jax.run.settings import MethodConfig

TEST_BATCH = 50


class Programs(NamedTuple):
    """One row on one federation's shapes, compiled at most once: rates and seeds are arguments."""

    method: h2.FederatedMethod
    specs: tuple
    round_fn: Any
    evaluate: Any
    mean_heads: bool


def federation_of(setting: Setting, seed: int, bases: tuple | None) -> Federation:
    """Build a setting's federation with the data of a seed; frozen weights are held once."""
    server = [] if setting.server is None else [setting.server]
    config = make_config({
        "rounds": setting.rounds,
        "seed": seed,
        "method": {"name": "local"},
        "groups": [*setting.groups, *server],
        **({} if setting.probe is None else {"probe": setting.probe}),
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


def programs_of(setting: Setting, row: Row, specs: tuple) -> Programs:
    """Build a row's programs."""
    method = method_of(row)
    if row.rank is not None:
        changes = {"rank": row.rank, "alpha": float(row.rank)}
        specs = tuple(dataclasses.replace(spec, **changes) for spec in specs)
    evaluate = h2.make_evaluate(method, specs, batch_size=TEST_BATCH, moment=setting.moment)
    return Programs(method, specs, h2.make_round(method, specs), evaluate, row.mean_heads)


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


def head_numbers(state: h2.RoundState) -> int:
    """Count the numbers of one client's head."""
    return sum(leaf[0].size for leaf in jax.tree.leaves(state.clients[0].params["head"]))


def train(
    programs: Programs, federation: Federation, rounds: int, rate: float, seed: int
) -> tuple[h2.RoundState, dict[str, np.ndarray]]:
    """Train a federation: -> (its state, numbers [2, C] that each client sent up and got, in all)."""
    method, specs = programs.method, programs.specs
    state = h2.init_round(method, specs, federation.bases, federation.probe, jax.random.key(seed))
    heads = 0
    if programs.mean_heads:
        heads, state = head_numbers(state), with_mean_heads(state)
    hyper = with_rate(method.hyper, rate)
    travelled = {spec.name: np.zeros((2, spec.num_clients)) for spec in specs}
    for _ in range(rounds):
        state, metrics = programs.round_fn(
            state, federation.bases, federation.train, None, None, hyper, np.uint32(seed),
            federation.probe,
        )  # fmt: skip
        if programs.mean_heads:
            state = with_mean_heads(state)
        for name, seen in metrics.clients.items():
            if not np.asarray(seen["finite"]).all():
                print(f"  seed {seed}, rate {rate:g}: {name} was not finite", flush=True)
            for place, way in enumerate(("numbers_up", "numbers_down")):
                travelled[name][place] += np.asarray(seen[way], float) + heads
    return state, travelled


def lines_of(
    setting: Setting, programs: Programs, federation: Federation, run: Run
) -> list[dict[str, Any]]:
    """Do one run: -> its lines, one a client."""
    began = time.perf_counter()
    state, travelled = train(programs, federation, setting.rounds, run.rate, run.seed)
    rows = federation.test if run.split == "test" else federation.validation
    found = jax.device_get(programs.evaluate(state, federation.bases, rows))
    seconds = time.perf_counter() - began
    lines = []
    for spec, held in zip(programs.specs, rows):
        counts = np.asarray(held.num_examples)
        for client in range(spec.num_clients):
            up, down = travelled[spec.name][:, client]
            lines.append({
                "setting": setting.name, "row": run.row, "rate": run.rate, "seed": run.seed,
                "split": run.split, "round": setting.rounds, "client": f"{spec.name}/{client}",
                "examples": int(counts[client]),
                "accuracy": round(float(found[spec.name]["accuracy"][client]), 6),
                "loss": round(float(found[spec.name]["loss"][client]), 6),
                "numbers_up": int(up), "numbers_down": int(down), "seconds": round(seconds, 1),
                "device": jax.devices()[0].device_kind,
                "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__,
            })  # fmt: skip
    return lines

"""What a config's federation is made of, before anything runs: for `h2tune run --dry-run`.

Only shapes are computed (`jax.eval_shape`): no weight is read and nothing is compiled.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from h2tune_jax.check import check_federation
from h2tune_jax.method import FederatedMethod
from h2tune_jax.round import init_round, resolve_axis
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.federation import (
    Federation,
    build_federation,
    format_cut,
    loss_of,
    tree_bytes,
)
from h2tune_jax.run.feed import is_repeated
from h2tune_jax.run.settings import GroupConfig, RunConfig
from h2tune_jax.types import Adapters, Batch, ClientData, CohortSpec, PyTree, RoundState


class GroupDescription(NamedTuple):
    """One group."""

    name: str
    clients: int
    sampled: float  # a round, on average
    model: str
    task: str
    labels: int  # 0 without labels
    cut: str  # what of its texts was; "" where nothing
    examples: str  # that a client trains on
    tested: int  # rows of a client's test set, at most
    steps: str  # of a client in a round
    rank: int
    targets: tuple[str, ...]
    adapter: int  # parameters that one client adds to the base
    head: int  # parameters of its task head
    bytes_up: int  # of one client in a round, at most
    bytes_down: int


class Description(NamedTuple):
    """A federation, and what it will need."""

    name: str
    method: str
    rounds: int
    seed: int
    client_axis: str | int
    store: str
    groups: tuple[GroupDescription, ...]
    bytes_up: int  # of all participants of a round, at most
    bytes_down: int
    memory: dict[str, int]  # bytes on the device, by what they are for

    @property
    def memory_total(self) -> int:
        """Bytes on the device, estimated."""
        return sum(self.memory.values())


def describe(config: RunConfig, federation: Federation | None = None) -> Description:
    """Describe what a config will run; checks what `init_round` would check.

    Traffic is what the method counts as `bytes_up` and `bytes_down`, where that is the size of whole
    arrays. Where it depends on a client's state (entries that were selected, a rank that shrinks), it is
    all that the upload or download holds but masks, what is sent at first contact only with it.

    The memory of activations is what one training step keeps for its backward pass; XLA keeps some of
    it shorter, and needs buffers of its own. Raises `FederationError` as `build_federation` does.
    """
    federation = build_federation(config, weights=False) if federation is None else federation
    method, specs = build_method(config), federation.specs
    check_federation(method, specs, federation.bases)
    bases = jax.tree.map(_shape, federation.bases)
    key = jax.eval_shape(jax.random.key, 0)
    start = lambda bases, probe, key: init_round(method, specs, bases, probe, key)
    state = jax.eval_shape(start, bases, jax.tree.map(_shape, federation.probe), key)
    axis = resolve_axis(config.engine.client_axis)

    groups, steps, sampled_state = [], [], 0
    for i, (group, spec) in enumerate(zip(config.groups, specs)):
        sampled = count_sampled(config, group)
        at_once = {"vmap": max(round(sampled), 1), "scan": 1}.get(str(axis), axis)
        one = _describe_client(method, federation, state, i, key)
        batch = _step_bytes(group, federation, i, one.adapters, bases[i])
        # Parameters, gradient and two moments live while a client trains.
        steps.append(int(at_once) * (batch + 4 * _bytes(one.adapters)))
        sampled_state += round(sampled) * one.state_bytes
        groups.append(_describe_group(config, group, spec, federation, i, sampled, one))
    stored = _bytes(state.clients) if config.store.kind == "device" else 2 * sampled_state
    return Description(
        name=config.name,
        method=config.method.name,
        rounds=config.rounds,
        seed=config.seed,
        client_axis=axis,
        store=config.store.kind,
        groups=tuple(groups),
        bytes_up=round(sum(g.sampled * g.bytes_up for g in groups)),
        bytes_down=round(sum(g.sampled * g.bytes_down for g in groups)),
        memory={
            "frozen bases": tree_bytes(federation.bases),
            "clients' state": stored,
            "server's state": _bytes(state.server),
            "data": sum(map(_data_bytes, (*federation.train, *federation.test))),
            "one training step": max(steps),
        },
    )


def count_sampled(config: RunConfig, group: GroupConfig) -> float:
    """Return how many of a group take part in a round; for a fixed schedule, on average."""
    sampling, new = config.sampling, config.evaluation.newcomers
    count = group.count - (0 if new is None else new.count)
    if sampling.kind == "all":
        return count
    if sampling.kind == "schedule":
        rounds = sampling.schedule or ()
        names = set(group.client_names[:count])
        return sum(len(names & set(chosen)) for chosen in rounds) / len(rounds)
    if sampling.count is not None:
        return min(sampling.count, count)
    assert sampling.fraction is not None  # the settings say so
    return max(round(sampling.fraction * count), 1)


class _Client(NamedTuple):
    """Shapes of one client."""

    adapters: Adapters
    state_bytes: int
    bytes_up: int
    bytes_down: int


def _describe_client(
    method: FederatedMethod, federation: Federation, state: RoundState, place: int, key: Any
) -> _Client:
    specs, spec = federation.specs, federation.specs[place]
    client = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state.clients[place]
    )
    ids = tuple(jax.ShapeDtypeStruct((1,), np.int32) for _ in specs)
    send = lambda key, server, ids, index: method.broadcast(specs, key, server, ids, index)
    download = jax.eval_shape(send, key, state.server, ids, state.round)[place]
    personal = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), download.personal
    )
    download = download._replace(personal=personal)
    data = _one_client(federation.train[place])

    def train(*args: Any) -> tuple[PyTree, Any, Any]:
        _, upload, metrics = method.client_update(spec, *args)
        return upload, metrics["bytes_up"], metrics["bytes_down"]

    base, hyper = jax.tree.map(_shape, (federation.bases[place], method.hyper))
    traced, (upload, *_) = jax.make_jaxpr(train, return_shape=True)(
        key, base, client, download, data, hyper, state.round
    )
    # A count of whole arrays is a constant of the program; others depend on the client's state.
    counts = [
        round(float(count.val)) if isinstance(count, Literal) else None
        for count in traced.jaxpr.outvars[-2:]
    ]
    up, down = (
        _traffic(tree) if known is None else known
        for known, tree in zip(counts, (upload, download))
    )
    look = lambda server, client: method.adapters(spec, server, client, None)
    return _Client(
        adapters=jax.eval_shape(look, state.server, client),
        state_bytes=_bytes(client),
        bytes_up=up,
        bytes_down=down,
    )


def _traffic(tree: PyTree) -> int:
    """Count numbers; masks say which of them there are, and are not sent."""
    return _bytes([leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != bool])


def _one_client(data: ClientData) -> ClientData:
    cut = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    return jax.tree.map(cut, data)


def _step_bytes(
    group: GroupConfig, federation: Federation, place: int, adapters: Adapters, base: PyTree
) -> int:
    """Count what one training step of one client keeps for its backward pass."""
    facts, budget = federation.groups[place], group.budget
    assert facts.model is not None
    # Of a batch in parts one part's activations live at a time.
    loss_fn = loss_of(facts.model, group.task.kind, group.task.normalise, None)
    rows = budget.batch_size // budget.microbatches
    part = lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[2:]), leaf.dtype)
    mask: Any = jax.ShapeDtypeStruct((rows,), bool)
    batch = Batch(jax.tree.map(part, federation.train[place].examples), mask)

    def backward(adapters: Adapters, base: PyTree, batch: Batch) -> PyTree:
        return jax.vjp(lambda ours: loss_fn(ours, base, batch, None)[0], adapters)[1]

    # What is kept includes the weights themselves, which are counted elsewhere.
    weights = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(base)}
    kept = jax.tree.leaves(jax.eval_shape(backward, adapters, base, batch))
    return _bytes([leaf for leaf in kept if (leaf.shape, leaf.dtype) not in weights])


def _describe_group(
    config: RunConfig,
    group: GroupConfig,
    spec: CohortSpec,
    federation: Federation,
    place: int,
    sampled: float,
    one: _Client,
) -> GroupDescription:
    facts, train, test = (
        federation.groups[place],
        federation.train[place].num_examples,
        federation.test[place].num_examples,
    )
    held = sorted({int(n) for n in np.asarray(train)})
    span = lambda values: f"{values[0]}" if values[0] == values[-1] else f"{values[0]}-{values[-1]}"
    budget = spec.budget
    steps = [budget.steps or (budget.epochs or 1) * -(-n // budget.batch_size) for n in held]
    size = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
    return GroupDescription(
        name=group.name,
        clients=group.count,
        sampled=sampled,
        model=_describe_model(group, facts.model),
        task=f"{facts.task.rsplit('/', 1)[-1]}, {facts.kind}",
        labels=len(facts.labels),
        cut=format_cut(facts.cut),
        examples=span(held),
        tested=int(np.max(np.asarray(test))),
        steps=span(steps),
        rank=group.rank,
        targets=spec.kinds,
        adapter=size(one.adapters.sites),
        head=size(one.adapters.head),
        bytes_up=one.bytes_up,
        bytes_down=one.bytes_down,
    )


def _describe_model(group: GroupConfig, model: Any) -> str:
    config = model.config
    source = group.model.source
    name = config.arch if source == "random" else source.rstrip("/").rsplit("/", 1)[-1]
    pruned = ", pruned" if config.kept else ""
    dtype = "" if config.dtype == "float32" else f", {config.dtype}"
    return f"{name}, {config.num_layers} x {config.width}{pruned}{dtype}"


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _bytes(tree: PyTree) -> int:
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def _data_bytes(data: ClientData) -> int:
    """Count clients' examples; rows that all of them share are there once."""
    copies = len(data.num_examples) if is_repeated(data.examples) else 1
    return _bytes(data.examples) // copies + _bytes(data.num_examples)


def format_bytes(count: float) -> str:
    """Write a number of bytes with a unit: 1536 -> "1.5 kB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def format_description(what: Description) -> str:
    """Write a description as plain text."""
    clients = sum(group.clients for group in what.groups)
    lines = [
        f"{what.name}: {what.method}, {what.rounds} rounds, seed {what.seed}, {clients} clients in "
        f"{len(what.groups)} groups, clients by {what.client_axis}, state on {what.store}",
        "",
    ]
    for group in what.groups:
        labels = f" ({group.labels} labels)" if group.labels else ""
        sampled = (
            f"{group.sampled:.4g} a round" if group.sampled != group.clients else "all a round"
        )
        lines += [
            f"{group.name}: {group.clients} clients, {sampled}",
            f"  model      {group.model}",
            f"  task       {group.task}{labels}; {group.examples} examples and {group.steps} steps a "
            f"client and round, {group.tested} to test on",
            *([f"  length     {group.cut}"] if group.cut else []),
            f"  adapters   rank {group.rank} on {', '.join(group.targets) or 'nothing'}: "
            f"{group.adapter:,} parameters a client, and {group.head:,} of its head",
            f"  traffic    at most {format_bytes(group.bytes_up)} up and "
            f"{format_bytes(group.bytes_down)} down a client and round",
        ]
    lines += [
        "",
        f"a round sends at most {format_bytes(what.bytes_up)} up and {format_bytes(what.bytes_down)} down",
        f"memory on the device, estimated: {format_bytes(what.memory_total)}",
        *(f"  {name:<18}{format_bytes(count):>10}" for name, count in what.memory.items()),
    ]
    return "\n".join(lines)

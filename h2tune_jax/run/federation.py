"""From a config to a federation: specifications, frozen bases, and every client's data."""

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from h2tune_jax import tasks
from h2tune_jax.models.model import Model
from h2tune_jax.run.load_models import Loaded, ModelSources, head_of
from h2tune_jax.run.load_tasks import Cut, GroupData, encode_inputs, load_groups, read_texts
from h2tune_jax.run.settings import GroupConfig, RunConfig, TaskConfig
from h2tune_jax.tasks.objective import accumulate
from h2tune_jax.types import Budget, ClientData, CohortSpec, FederationError, PyTree, Specs


class GroupFacts(NamedTuple):
    """What people and exports want to know of a group beside its arrays."""

    name: str
    model: Model | None
    tokenizer: Any  # or None: images
    labels: tuple[str, ...]  # () without labels
    task: str  # the data's name, or file
    kind: str  # one of `tasks.objective.TASKS`
    majority: float  # share of the most frequent label among the test rows; NaN without labels
    client_names: tuple[str, ...]
    cut: Cut = Cut()


class Federation(NamedTuple):
    """All that a run works on; one entry a group everywhere."""

    specs: Specs
    bases: tuple[PyTree, ...]
    train: tuple[ClientData, ...]  # numpy leaves [C, n, ...]
    validation: tuple[ClientData | None, ...]
    test: tuple[ClientData, ...]  # views of one copy where clients share their test rows
    probe: tuple[PyTree, ...] | None
    groups: tuple[GroupFacts, ...]


def build_federation(config: RunConfig, *, weights: bool = True) -> Federation:
    """Load the models and the data that a config names.

    Data depends on the config and its seed alone. With `weights=False` the bases are shapes
    (`jax.ShapeDtypeStruct`) and no weight is read: enough to describe the federation.

    Raises `FederationError`, with the group's name, and `tasks.assets.AssetError`.
    """
    sources = ModelSources(weights=weights)
    loaded = _tell_apart([_named(group, sources.load, group.model) for group in config.groups])
    data = load_groups(config.groups, [one.tokenizer for one in loaded], config.seed)
    specs = tuple(
        _named(group, _make_spec, config, group, one.model, rows)
        for group, one, rows in zip(config.groups, loaded, data)
    )
    facts = tuple(
        GroupFacts(
            name=group.name,
            model=one.model,
            tokenizer=one.tokenizer,
            labels=rows.labels,
            task=group.task.data,
            kind=group.task.kind,
            majority=rows.majority,
            client_names=group.client_names,
            cut=rows.cut,
        )
        for group, one, rows in zip(config.groups, loaded, data)
    )
    return Federation(
        specs=specs,
        bases=tuple(one.base for one in loaded),
        train=tuple(rows.train for rows in data),
        validation=tuple(rows.validation for rows in data),
        test=tuple(rows.test for rows in data),
        probe=_make_probe(config, [one.tokenizer for one in loaded]),
        groups=facts,
    )


def _named(group: GroupConfig, build: Any, *args: Any) -> Any:
    """Put the group's name before an error that does not have it."""
    try:
        return build(*args)
    except FederationError as error:
        if repr(group.name) in str(error):
            raise
        raise FederationError(f"group {group.name!r}: {error}") from None


def _tell_apart(loaded: list[Loaded]) -> list[Loaded]:
    """Add to a model's name where its weights came from, where models of one name differ in that.

    A model is named by its config and by which layers it keeps, and methods take equal names for one
    frozen base, whose clients they average. They fold names into random keys, too: so a name stays as it
    is wherever it is in no doubt, and what was drawn for a federation before is drawn for it again.
    """
    origins: dict[str, set[str]] = {}
    for one in loaded:
        origins.setdefault(one.model.spec.name, set()).add(one.origin)

    def rename(one: Loaded) -> Loaded:
        name = one.model.spec.name
        if len(origins[name]) == 1:
            return one
        # What all of them begin with says only on which machine this is. (By characters: a hub id has
        # no path in common with a file.)
        begin = os.path.commonprefix([*origins[name]])  # noqa: RUF071
        spec = dataclasses.replace(one.model.spec, name=f"{name}-{one.origin.removeprefix(begin)}")
        return one._replace(model=one.model._replace(spec=spec))

    return [rename(one) for one in loaded]


def _make_spec(config: RunConfig, group: GroupConfig, model: Model, rows: GroupData) -> CohortSpec:
    task, budget = group.task, group.budget
    num_outputs = {"classification": len(rows.labels), "regression": 1}.get(task.kind)
    if task.kind == "classification" and num_outputs == 1:
        raise FederationError(f"task.data: all rows have the label {rows.labels[0]!r}")
    return CohortSpec(
        name=group.name,
        num_clients=group.count,
        model=model.spec,
        rank=group.rank,
        loss_fn=loss_of(
            model,
            task.kind,
            task.normalise,
            None if budget.microbatches == 1 else budget.batch_size // budget.microbatches,
        ),
        budget=Budget(
            batch_size=budget.batch_size,
            epochs=budget.epochs,
            steps=budget.steps,
            shuffle=budget.shuffle,
        ),
        targets=group.targets,
        init_head_fn=None if num_outputs is None else head_of(model, num_outputs),
        head_rate_factor=group.head_rate_factor,
        alpha=group.alpha,
        dropout=group.dropout,
        dtype=group.dtype,
        kernels=config.engine.kernels,
    )


@functools.lru_cache(maxsize=256)
def loss_of(model: Model, kind: str, normalise: Any, part_size: int | None) -> Any:
    """Return a group's loss function: one for equal settings, so that its programs compile once.

    `part_size` is of `accumulate`; None computes every batch whole.
    """
    loss_fn = tasks.make_loss_fn(tasks.forward_of(model, kind), kind, normalise=normalise)
    return loss_fn if part_size is None else accumulate(loss_fn, part_size)


def _make_probe(config: RunConfig, tokenizers: list[Any]) -> tuple[PyTree, ...] | None:
    """Tokenise the same public texts for every group's model."""
    probe = config.probe
    if probe is None:
        return None
    task = TaskConfig(data=probe.data, text=probe.text, max_length=probe.max_length)
    rows = read_texts(task, probe.count, config.seed)
    seen: dict[int, PyTree] = {}
    for group, tokenizer in zip(config.groups, tokenizers):
        if tokenizer is None:
            raise FederationError(
                f"group {group.name!r}: its model reads images, the probe is text"
            )
        if id(tokenizer) not in seen:
            arrays = encode_inputs(task, rows, tokenizer, where="probe")
            seen[id(tokenizer)] = {
                name: np.asarray(arrays[name]) for name in ("input_ids", "attention_mask")
            }
    return tuple(seen[id(tokenizer)] for tokenizer in tokenizers)


def format_cut(cut: Cut) -> str:
    """Say how many of a group's texts were cut; "" where none was."""
    if cut.num_truncated == 0:
        return ""
    return (
        f"{cut.num_truncated:,} of {cut.num_texts:,} texts cut to {cut.max_length} tokens, by "
        f"{cut.num_lost_tokens:,} tokens in all"
    )


def client_weights(config: RunConfig, federation: Federation) -> tuple[np.ndarray, ...]:
    """Return each client's weight in the server's means: f32[C] a group."""
    found = []
    for group, data in zip(config.groups, federation.train):
        counts = np.asarray(data.num_examples, np.float32)
        fixed = group.weight != "examples"
        found.append(np.full(group.count, group.weight, np.float32) if fixed else counts)
    return tuple(found)


def find_client(federation: Federation, name: str) -> tuple[int, int]:
    """Return the group's place and the client's id of a client's name, such as "minilm/0"."""
    for place, group in enumerate(federation.groups):
        if name in group.client_names:
            return place, group.client_names.index(name)
    from h2tune_jax.types import near_match

    names = [client for group in federation.groups for client in group.client_names]
    raise FederationError(f"no client is called {name!r}; {near_match(name, names[:20])}")


def tree_bytes(tree: PyTree) -> int:
    """Return the bytes of all arrays (or shapes of arrays) of a tree, each array counted once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)

"""From the groups' `task` tables to every client's rows: which they are, and their arrays.

Rows are put into an order by a digest of the run's seed and their content. Groups that read the same
data get disjoint training rows, and nobody trains on what anybody is tested on: first come the shared
test rows, then the shared validation rows, then each group's own part. Groups may read the data with
different templates: rows that are equal to one of them stay together for all.
"""

import typing
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax import tasks
from h2tune_jax.run.settings import GroupConfig, TaskConfig
from h2tune_jax.tasks import corpora
from h2tune_jax.tasks.encoding import Encoded, Examples, fill_template
from h2tune_jax.tasks.reading import Row, read_column
from h2tune_jax.types import ClientData, FederationError, near_match

SUITES: Mapping[str, Callable[[Any, str], tasks.Prepared]] = {
    "math": tasks.prepare_math,
    "glue": tasks.prepare_glue,
}


class Source(NamedTuple):
    """One data set, and what its images are where it has any."""

    rows: list[Row]
    images: np.ndarray | None = None  # u8[n, h, w]; a row then has its `index`


class Split(NamedTuple):
    """Row numbers of one group's clients. `shared` parts are the same for all of them."""

    train: tuple[np.ndarray, ...]
    validation: tuple[np.ndarray, ...] | None
    test: tuple[np.ndarray, ...]
    is_shared: bool  # test and validation


class Cut(NamedTuple):
    """What of a group's texts did not fit; a row that several clients read counts once."""

    num_texts: int = 0
    num_truncated: int = 0
    num_lost_tokens: int = 0
    max_length: int = 0


class GroupData(NamedTuple):
    """The arrays of one group's clients: numpy leaves [C, n, ...]."""

    train: ClientData
    validation: ClientData | None
    test: ClientData
    labels: tuple[str, ...]
    majority: float  # share of the most frequent label among the test rows; NaN without labels
    cut: Cut


def load_groups(
    groups: Sequence[GroupConfig], tokenizers: Sequence[Any], seed: int
) -> tuple[GroupData, ...]:
    """Read, split, deal out and encode the data of all groups; a function of its arguments alone."""
    sources = {_source_key(group.task): _read(group.task) for group in groups}
    out: list[GroupData | None] = [None] * len(groups)
    for key, source in sources.items():
        members = [i for i, group in enumerate(groups) if _source_key(group.task) == key]
        splits = _split_source(source, [groups[i] for i in members], seed)
        for i, split in zip(members, splits):
            out[i] = _encode_group(groups[i], source, split, tokenizers[i])
    return tuple(data for data in out if data is not None)


def _source_key(task: TaskConfig) -> tuple:
    return task.data, task.suite, task.split, task.subset


def _read(task: TaskConfig) -> Source:
    if task.suite is not None:
        suite, _, part = task.suite.partition("/")
        if suite not in SUITES:
            raise FederationError(
                f"suite: {task.suite!r} is unknown; {near_match(suite, SUITES)}, then / and its task"
            )
        return Source(SUITES[suite](task.data, part).rows)
    if task.data == "mnist":
        digits = corpora.load_mnist()["train"]
        rows = [{"index": i, "label": str(label)} for i, label in enumerate(digits.labels)]
        return Source(rows, digits.images)
    if task.data in corpora.LABELS:
        return Source(getattr(corpora, f"load_{task.data}")())
    if task.data.startswith("hub:"):
        name = task.data.removeprefix("hub:")
        return Source(tasks.read_rows(name, split=task.split, config=task.subset))
    if not any(mark in task.data for mark in "./\\"):
        raise FederationError(
            f"no data set is called {task.data!r}; {near_match(task.data, corpora.LABELS)}, "
            "a file, or 'hub:owner/name'"
        )
    return Source(tasks.read_rows(task.data))


def _templates(task: TaskConfig) -> tuple[str, ...]:
    """Return what the inputs of a task's texts are made with."""
    if task.kind in ("causal_lm", "multiple_choice"):
        return (task.prompt,)
    return (task.text,) if task.pair is None else (task.text, task.pair)


def _content(task: TaskConfig, source: Source) -> Callable[[Row], Any]:
    """Say what of a row counts as its content: equal contents stay in one split."""
    if source.images is not None:
        return lambda row: row["index"]
    templates = _templates(task)
    return lambda row: [fill_template(template, row, where=task.data) for template in templates]


Forms = Mapping[tuple[str, ...], TaskConfig]
"""The templates that the rows of one data set are read with, each with a task that has them."""


def _forms(source: Source, groups: Sequence[GroupConfig]) -> Forms:
    images = source.images is not None
    return {() if images else _templates(group.task): group.task for group in groups}


def _split_rows(
    source: Source, forms: Forms, sizes: Mapping[str, int | None], seed: int
) -> dict[str, np.ndarray]:
    """Split rows so that those which any task reads as equal stay together."""
    read = [(form, _content(forms[form], source)) for form in sorted(forms)]
    if len(read) == 1:
        return tasks.split_rows(source.rows, sizes, seed=seed, by=read[0][1])
    contents = [[(form, *content(row)) for form, content in read] for row in source.rows]
    units = _units(contents)
    # The rows of a unit differ: which of them come first must not depend on the file's order.
    order = sorted(range(len(contents)), key=contents.__getitem__)
    parts = tasks.split_rows(order, sizes, seed=seed, by=units.__getitem__)
    return {name: np.array(order)[part] for name, part in parts.items()}


def _units(contents: Sequence[Sequence[Any]]) -> list[Any]:
    """Give each row the name of its unit: rows with a content in common, if by way of other rows.

    Every row has several contents. The smallest in a unit is its name, whatever the rows' order.
    """
    above: dict[Any, Any] = {}

    def root(content: Any) -> Any:
        while (parent := above.setdefault(content, content)) != content:
            above[content] = above[parent]  # so that paths stay short
            content = parent
        return content

    for own in contents:
        smallest, *rest = sorted(map(root, own))
        above.update(dict.fromkeys(rest, smallest))
    return [root(own[0]) for own in contents]


def _split_source(source: Source, groups: Sequence[GroupConfig], seed: int) -> list[Split]:
    """Deal the rows of one data set out to the groups that read it."""
    shared = [group.task for group in groups if group.task.held_out == "shared"]
    sizes: dict[str, int | None] = {}
    for name in ("test", "validation"):
        if largest := max((getattr(task, name) for task in shared), default=0):
            sizes[name] = largest
    # What is left has one taker, or takers whose clients may share rows anyway.
    rest = [
        g for g in groups if g.task.train is None or g.task.partition.kind in ("draw", "by_key")
    ]
    if len(rest) > 1 and any(g.task.partition.kind != "draw" for g in rest):
        names = ", ".join(repr(group.name) for group in rest)
        raise FederationError(
            f"groups {names} each take all that is left of data {groups[0].task.data!r}: say how many "
            "rows each takes (task.train), and partition otherwise than 'by_key'"
        )
    forms = _forms(source, groups)
    # By name, for a result that does not depend on the config's order; one form keeps to it, as of old.
    for group in sorted(groups, key=lambda group: group.name) if len(forms) > 1 else groups:
        if group not in rest:
            task, own = group.task, group.task.held_out == "own"
            assert task.train is not None
            each = task.train + (task.validation + task.test if own else 0)
            sizes[f"group {group.name}"] = each * group.count
    if rest:
        sizes["rest"] = None
    where = f"data {groups[0].task.data!r}"
    try:
        parts = _split_rows(source, forms, sizes, seed)
    except FederationError as error:
        raise FederationError(f"{where}: {error}") from None
    found = []
    for group in groups:
        pool = parts.get(f"group {group.name}", parts.get("rest"))
        assert pool is not None
        # A part is longer than asked for by the repeats of its last row.
        if (size := sizes.get(f"group {group.name}")) is not None:
            pool = pool[:size]
        found.append(_deal(group, source, pool, parts, seed))
    return found


def _deal(
    group: GroupConfig,
    source: Source,
    pool: np.ndarray,
    parts: Mapping[str, np.ndarray],
    seed: int,
) -> Split:
    """Deal one group's rows out to its clients."""
    task = group.task
    rng = np.random.default_rng([seed, zlib.crc32(group.name.encode())])
    where = f"group {group.name!r}, task.partition"
    try:
        clients = _partition(group, source, pool, rng, seed)
    except FederationError as error:
        raise FederationError(f"{where}: {error}") from None
    if task.held_out == "shared":
        held = lambda name, size: (parts[name][:size],) * group.count
        validation = held("validation", task.validation) if task.validation else None
        return Split(clients, validation, held("test", task.test), True)
    train, validation, test = zip(*(_cut_own(group, source, rows, seed) for rows in clients))
    return Split(train, validation if task.validation else None, test, False)


def _cut_own(
    group: GroupConfig, source: Source, rows: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut one client's rows into training, validation and test rows, in the settings' proportions.

    No row is in two parts, and no repeat of it.
    """
    task = group.task
    if task.train is None:
        sizes = {"test": task.test, "validation": task.validation}
    else:
        whole = task.train + task.validation + task.test
        share = lambda size: max(round(len(rows) * size / whole), 1) if size else 0
        sizes = {"test": share(task.test), "validation": share(task.validation)}
    held = {name: size for name, size in sizes.items() if size}
    own = [source.rows[i] for i in rows]
    try:
        parts = tasks.split_rows(own, {**held, "train": None}, seed=seed, by=_content(task, source))
    except FederationError:
        raise FederationError(
            f"group {group.name!r}: a client has {len(rows)} rows, too few to train on some and to "
            f"hold out {sum(sizes.values())} (repeats of a row stay together)"
        ) from None
    # A part is longer than asked for by the repeats of its last row.
    test, validation = (
        rows[parts[name][:size]] if size else rows[:0] for name, size in sizes.items()
    )
    return np.sort(rows[parts["train"]]), validation, test


def _partition(
    group: GroupConfig, source: Source, pool: np.ndarray, rng: np.random.Generator, seed: int
) -> tuple[np.ndarray, ...]:
    task, count = group.task, group.count
    rule = task.partition
    if rule.kind == "iid":
        return tuple(pool[part] for part in tasks.partition_iid(len(pool), count, rng))
    if rule.kind == "draw":
        assert task.train is not None
        if task.train > len(pool):
            raise FederationError(f"{task.train} rows a client, but there are only {len(pool)}")
        crc = zlib.crc32(group.name.encode())
        draw = lambda i: np.random.default_rng([seed, crc, i]).choice(
            len(pool), task.train, replace=False
        )
        return tuple(pool[np.sort(draw(i))] for i in range(count))
    if rule.kind == "by_key":
        assert rule.key is not None
        return _by_key(group, source, pool)
    names = read_column([source.rows[i] for i in pool], task.label, where=f"data {task.data!r}")
    labels = [str(name) for name in names]
    if rule.kind == "dirichlet":
        assert rule.alpha is not None
        dealt = tasks.partition_dirichlet(
            labels, count, rule.alpha, rng, min_examples=rule.min_examples
        )
    else:
        assert rule.classes is not None
        dealt = tasks.partition_pathological(labels, count, rule.classes, rng)
    return tuple(pool[part] for part in dealt)


def _by_key(group: GroupConfig, source: Source, pool: np.ndarray) -> tuple[np.ndarray, ...]:
    """Make clients of the first keys that have enough rows; `train` is the most that each trains on."""
    task, rule = group.task, group.task.partition
    assert rule.key is not None
    keys = read_column([source.rows[i] for i in pool], rule.key, where=f"data {task.data!r}")
    parts = [part for part in tasks.partition_by_key(keys) if len(part) >= rule.min_examples]
    if len(parts) < group.count:
        raise FederationError(
            f"{group.count} clients, but only {len(parts)} values of {rule.key!r} have at least "
            f"{rule.min_examples} rows"
        )
    most = None if task.train is None else task.train
    if most is not None and task.held_out == "own":
        most += task.validation + task.test
    return tuple(pool[part[:most]] for part in parts[: group.count])


def read_texts(task: TaskConfig, count: int, seed: int) -> list[Row]:
    """Return so many rows of a data set, the first in the order of their digests."""
    source = _read(task)
    chosen = tasks.split_rows(source.rows, {"probe": count}, seed=seed, by=_content(task, source))[
        "probe"
    ]
    return [source.rows[i] for i in chosen[:count]]


def label_names(task: TaskConfig, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the label set: the settings', the data set's own, or all labels that occur, sorted."""
    if task.kind not in ("classification", "multiple_choice"):
        return ()
    if task.labels is not None:
        return task.labels
    if task.data in corpora.LABELS:
        return corpora.LABELS[task.data]
    column = read_column(rows, task.label, where=f"data {task.data!r}")
    if task.kind == "multiple_choice" and all(isinstance(value, int) for value in column):
        return tuple(map(str, range(max(column) + 1)))
    return tuple(sorted(set(map(str, column))))


def _encode_group(group: GroupConfig, source: Source, split: Split, tokenizer: Any) -> GroupData:
    """Tokenise each row that is used once, and stack the clients' parts."""
    task = group.task
    labels = label_names(task, source.rows)
    parts = [*split.train, *split.test, *(split.validation or ())]
    used = np.unique(np.concatenate(parts))
    rows = [source.rows[i] for i in used]
    where = f"group {group.name!r}"
    encoded = encode_rows(task, rows, tokenizer, labels, images=source.images, where=where)
    examples = encoded.examples
    find = lambda part: np.searchsorted(used, part)

    def stack(clients: tuple[np.ndarray, ...], shared: bool) -> ClientData:
        if shared:
            return _repeat(tasks.take_rows(examples, find(clients[0])), group.count)
        rows = [find(part) for part in clients]
        # Rows beyond a client's own repeat its first: real inputs, which no model answers with NaN.
        room = np.arange(max(map(len, rows)))
        place = np.stack([part[np.where(room < len(part), room, 0)] for part in rows])
        counts = np.array([len(part) for part in rows], np.int32)
        return _client_data({name: leaf[place] for name, leaf in examples.items()}, counts)

    majority = float("nan")
    if labels:
        tested = np.concatenate(split.test[:1] if split.is_shared else split.test)
        counts = np.bincount(examples["labels"][find(tested)])
        majority = float(counts.max() / counts.sum())
    return GroupData(
        train=stack(split.train, False),
        validation=None if split.validation is None else stack(split.validation, split.is_shared),
        test=stack(split.test, split.is_shared),
        labels=labels,
        majority=majority,
        cut=Cut(encoded.num_texts, encoded.num_truncated, encoded.num_lost_tokens, task.max_length),
    )


def _repeat(examples: Examples, count: int) -> ClientData:
    """Show the same rows to every client, without a copy of them."""
    view = lambda leaf: np.broadcast_to(leaf[None], (count, *leaf.shape))
    size = len(next(iter(examples.values())))
    return _client_data(
        {name: view(leaf) for name, leaf in examples.items()}, np.full(count, size, np.int32)
    )


def _client_data(examples: Examples, counts: np.ndarray) -> ClientData:
    # The core's types speak of JAX arrays; these go to the device when the loop sends them there.
    return ClientData(examples, typing.cast(Any, counts))


def encode_rows(
    task: TaskConfig,
    rows: Sequence[Row],
    tokenizer: Any,
    labels: Sequence[str],
    *,
    images: np.ndarray | None = None,
    where: str = "data",
) -> Encoded:
    """Turn rows into the arrays that the task's loss function reads."""
    form = {"max_length": task.max_length, "where": where}
    if task.kind == "causal_lm":
        return tasks.encode_answers(rows, tokenizer, prompt=task.prompt, answer=task.answer, **form)
    if task.kind == "multiple_choice":
        return tasks.encode_choices(
            rows,
            tokenizer,
            prompt=task.prompt,
            choices=task.choices,
            label_names=labels,
            field=task.label,
            **form,
        )
    if images is None:
        inputs = _encode_texts(task, rows, tokenizer, where)
    else:
        pixels = images[[row["index"] for row in rows]].astype(np.float32) / 255
        inputs = Encoded({"pixel_values": (pixels[:, None] - 0.5) / 0.5}, 0, 0, 0)
    if task.kind == "regression":
        wanted = {"targets": tasks.encode_targets(rows, field=task.target, where=where)}
    else:
        wanted = {"labels": tasks.encode_labels(rows, labels, field=task.label, where=where)}
    return inputs._replace(examples=inputs.examples | wanted)


def encode_inputs(
    task: TaskConfig, rows: Sequence[Row], tokenizer: Any, *, where: str = "data"
) -> Examples:
    """Turn rows into what the model reads, without what it should answer."""
    if task.kind in ("causal_lm", "multiple_choice"):
        return tasks.encode_prompts(
            rows, tokenizer, max_length=task.max_length, prompt=task.prompt, where=where
        ).examples
    return _encode_texts(task, rows, tokenizer, where).examples


def _encode_texts(task: TaskConfig, rows: Sequence[Row], tokenizer: Any, where: str) -> Encoded:
    return tasks.encode_texts(
        rows, tokenizer, max_length=task.max_length, text=task.text, pair=task.pair, where=where
    )

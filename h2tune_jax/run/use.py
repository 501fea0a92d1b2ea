"""A finished (or unfinished) run put to use: its clients, and what they say to a text."""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax import models
from h2tune_jax.method import FederatedMethod
from h2tune_jax.run import checkpoint
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.config import config_digest, parse_config
from h2tune_jax.run.disk import Gone, RunError, reading
from h2tune_jax.run.federation import Federation, build_federation, find_client
from h2tune_jax.run.folder import RunFolder, is_live, read_facts
from h2tune_jax.run.load_tasks import encode_inputs
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.rows import Segments, index_from, layout_of, unpack
from h2tune_jax.run.settings import GroupConfig, RunConfig, TaskConfig
from h2tune_jax.tasks import decode_tokens, encode_choices
from h2tune_jax.types import Adapters, Batch, FederationError, PyTree

_TRIES = 5


class OpenRun(NamedTuple):
    """A run with the newest of its checkpoints that verifies."""

    folder: Path
    config: RunConfig
    federation: Federation
    method: FederatedMethod
    rounds: int  # done
    server: PyTree
    notices: tuple[str, ...]  # what the reader should know
    programs: Programs
    arrays: Mapping[str, np.ndarray]  # the checkpoint's
    meta: Mapping[str, Any]


class OpenClient(NamedTuple):
    """One client of a run, as local training left it."""

    name: str
    cohort: int
    group: GroupConfig
    adapters: Adapters


def open_run(folder: str | Path) -> OpenRun:
    """Rebuild a run's federation and method from its config, and read its newest good checkpoint.

    The run may be under way.
    """
    paths = RunFolder(Path(folder))
    facts = read_facts(paths)
    with reading("the run's config", paths.config):
        text = paths.config.read_text(encoding="utf-8", errors="replace")
    config = parse_config(text, where=str(paths.config))
    if facts.get("config_digest") != config_digest(config):
        raise RunError(
            f"{paths.config} was changed after the run began; run.json has another digest"
        )
    if not checkpoint.steps(paths):
        raise RunError(f"{paths.path} has no checkpoint that can be read: there is none")
    federation, method = build_federation(config), build_method(config)
    # One client is looked at here: whatever devices the run had, one is enough.
    engine = config.engine.model_copy(update={"devices": None})
    alone = config.model_copy(update={"engine": engine})
    programs = Programs(method, federation.specs, federation.bases, federation.probe, alone)
    return _read_newest(
        OpenRun(paths.path, config, federation, method, 0, None, (), programs, {}, {})
    )


def _read_newest(run: OpenRun) -> OpenRun:
    """Read the newest good checkpoint, last of all: a run under way keeps none of them for long."""
    paths = RunFolder(run.folder)
    found, skipped = checkpoint.read_newest(paths)
    notices = [f"{'; '.join(skipped)}; this is round {found.step}"] if skipped else []
    if is_live(paths):
        notices.append(f"the run is under way: this is what it held after round {found.step}")
    server = checkpoint.unflatten(run.programs.server_shapes(), found.arrays, ".server")
    return run._replace(
        rounds=found.step,
        server=run.programs.place(server),
        notices=tuple(notices),
        arrays=found.arrays,
        meta=found.meta,
    )


def open_with(folder: str | Path | OpenRun, name: str) -> tuple[OpenRun, OpenClient]:
    """Open a run and one of its clients; of a run under way, both from one checkpoint."""
    run = folder if isinstance(folder, OpenRun) else open_run(folder)
    for _ in range(_TRIES):
        try:
            return run, open_client(run, name)
        except Gone:  # its rows have moved since its checkpoint was read
            run = _read_newest(run)
    return run, open_client(run, name)


def open_client(run: OpenRun, name: str) -> OpenClient:
    """Find a client by name ("minilm/0") and build its adapters.

    Raises `Gone` where a run under way has deleted its rows meanwhile; `open_with` then reads again.
    """
    cohort, client = find_client(run.federation, name)
    state = client_state(run, cohort, client)
    adapters = run.method.adapters(run.federation.specs[cohort], run.server, state, None)
    return OpenClient(name, cohort, run.config.groups[cohort], adapters)


def client_state(run: OpenRun, cohort: int, client: int) -> PyTree:
    """Return one client's personal state, wherever the run kept it; one that never trained starts."""
    shape = run.programs.client_shapes(run.server)[cohort]
    if run.meta.get("store") == "device":
        prefix = f".clients[{cohort}]"
        own = {
            path: np.asarray(array)[client]
            for path, array in run.arrays.items()
            if path.startswith(prefix)
        }
        return run.programs.place(checkpoint.unflatten(shape, own, prefix))
    index = index_from(run.arrays[f".index[{cohort}]"])
    if client not in index:
        ids = np.full(run.programs.start_width(cohort), client, np.int32)
        started = run.programs.start_clients(run.server, cohort, ids)
        return jax.tree.map(lambda leaf: leaf[0], started)
    layout = layout_of(shape)
    segments = Segments(RunFolder(run.folder).clients, cohort, layout.row_bytes)
    rows = unpack(layout, 1, segments.read([(0, index[client])]))
    return run.programs.place(jax.tree.map(lambda leaf: leaf[0], rows))


# Prediction


def predict(
    folder: str | Path | OpenRun,
    client: str | OpenClient,
    text: str | Mapping[str, Any],
    *,
    max_new_tokens: int = 64,
) -> str:
    """Let a client answer.

    Args:
      folder: the run's, or an open run.
      client: its name, such as "minilm/0", or an open client of the open run.
      text: what stands in the task's one field; a row with all of them where it has several.
      max_new_tokens: of a completion, at most.

    Returns:
      A label (classification, multiple choice), a number as text (regression), or a completion.
    """
    if isinstance(client, str):
        run, client = open_with(folder, client)
    else:
        run = folder if isinstance(folder, OpenRun) else open_run(folder)
    task, facts = client.group.task, run.federation.groups[client.cohort]
    if facts.tokenizer is None or facts.model is None:
        raise FederationError(f"predict: the clients of group {facts.name!r} read images, not text")
    base, adapters = run.programs.bases[client.cohort], client.adapters
    row = row_of(task, text)
    if task.kind == "causal_lm":
        arrays = to_device(encode_inputs(task, [row], facts.tokenizer, where="text"))
        end = getattr(facts.tokenizer, "eos_token_id", None)
        if end is None:
            raise FederationError("predict: the tokenizer has no end-of-text token")
        pad = getattr(facts.tokenizer, "pad_token_id", None)
        made = models.generate(
            facts.model, base, adapters.sites, arrays,
            max_new_tokens=max_new_tokens, eos_ids=end, pad_id=pad,
        )  # fmt: skip
        return decode_tokens(facts.tokenizer, made.tokens, made.lengths)[0]
    if task.kind == "multiple_choice":
        return _choose(run, client, row)
    arrays = to_device(encode_inputs(task, [row], facts.tokenizer, where="text"))
    logits = facts.model.classify_fn(base, adapters.sites, adapters.head, arrays)
    if task.kind == "regression":
        return f"{float(logits[0, 0]):.6g}"
    return facts.labels[int(jnp.argmax(logits[0]))]


def _choose(run: OpenRun, client: OpenClient, row: Mapping[str, Any]) -> str:
    task, facts = client.group.task, run.federation.groups[client.cohort]
    if not isinstance(row.get(task.choices), list | tuple) or not row[task.choices]:
        raise FederationError(f"predict: a row needs the field {task.choices!r}, a list of choices")
    encoded = encode_choices(
        [{**row, task.label: facts.labels[0]}],
        facts.tokenizer,
        max_length=task.max_length,
        prompt=task.prompt,
        choices=task.choices,
        label_names=facts.labels,
        field=task.label,
        where="text",
    )
    batch = Batch(to_device(encoded.examples), jnp.ones(1, bool))
    spec, base = run.federation.specs[client.cohort], run.programs.bases[client.cohort]
    _, metrics = spec.loss_fn(client.adapters, base, batch, None)
    return str(row[task.choices][int(jnp.argmax(metrics["logits"][0]))])


def row_of(task: TaskConfig, text: str | Mapping[str, Any]) -> dict[str, Any]:
    """Make a row of a text, which stands in the only field that the task's templates name."""
    if not isinstance(text, str):
        return dict(text)
    asks = task.kind in ("causal_lm", "multiple_choice")
    templates = [task.prompt] if asks else [task.text, *([] if task.pair is None else [task.pair])]
    fields = {
        field for one in templates for _, field, _, _ in string.Formatter().parse(one) if field
    }
    if task.kind == "multiple_choice":
        fields.add(task.choices)
    if len(fields) != 1:
        raise FederationError(
            f"predict: the task reads the fields {', '.join(sorted(fields))}; give a row that has them"
        )
    return {fields.pop(): text}


def to_device(examples: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Put encoded rows on the device, without what no model reads."""
    return {name: jnp.asarray(leaf) for name, leaf in examples.items() if name != "lengths"}

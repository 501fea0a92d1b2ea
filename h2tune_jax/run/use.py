"""A finished (or unfinished) run put to use: its clients, for prediction and export."""

import dataclasses
import json
import shutil
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from h2tune_jax import models
from h2tune_jax.method import FederatedMethod
from h2tune_jax.run import checkpoint
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.config import config_digest, parse_config
from h2tune_jax.run.federation import Federation, build_federation, find_client
from h2tune_jax.run.folder import RunError, RunFolder, read_facts
from h2tune_jax.run.load_tasks import encode_inputs
from h2tune_jax.run.programs import Programs
from h2tune_jax.run.rows import Segments, index_from, layout_of, unpack
from h2tune_jax.run.settings import GroupConfig, ModelConfig, RunConfig, TaskConfig
from h2tune_jax.tasks import decode_tokens, encode_choices
from h2tune_jax.types import Adapters, Batch, FederationError, PyTree, near_match

Format = Literal["peft", "merged", "adapter"]

PUBLISHED = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
"""Hub names of fetched models whose published weights are exactly those that we read."""


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
    """Rebuild a run's federation and method from its config, and read its newest good checkpoint."""
    paths = RunFolder(Path(folder))
    facts = read_facts(paths)
    try:
        text = paths.config.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{paths.config} cannot be read: {error.strerror}") from error
    config = parse_config(text, where=str(paths.config))
    if facts.get("config_digest") != config_digest(config):
        raise RunError(
            f"{paths.config} was changed after the run began; run.json has another digest"
        )
    arrays, meta = checkpoint.read_arrays(paths)
    notices = []
    newest = checkpoint.steps(paths)[-1]
    if newest != meta["round"]:
        notices.append(
            f"the checkpoint of round {newest} does not verify; this is round {meta['round']}"
        )
    federation, method = build_federation(config), build_method(config)
    # One client is looked at here: whatever devices the run had, one is enough.
    engine = config.engine.model_copy(update={"devices": None})
    alone = config.model_copy(update={"engine": engine})
    programs = Programs(method, federation.specs, federation.bases, federation.probe, alone)
    server = checkpoint.unflatten(programs.server_shapes(), arrays, ".server")
    server = programs.place(server)
    return OpenRun(
        folder=paths.path,
        config=config,
        federation=federation,
        method=method,
        rounds=meta["round"],
        server=server,
        notices=tuple(notices),
        programs=programs,
        arrays=arrays,
        meta=meta,
    )


def open_client(run: OpenRun, name: str) -> OpenClient:
    """Find a client by name ("minilm/0") and build its adapters."""
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
    client_name: str,
    text: str | Mapping[str, Any],
    *,
    max_new_tokens: int = 64,
) -> str:
    """Let a client answer.

    Args:
      folder: the run's, or an open run.
      client_name: such as "minilm/0".
      text: what stands in the task's one field; a row with all of them where it has several.
      max_new_tokens: of a completion, at most.

    Returns:
      A label (classification, multiple choice), a number as text (regression), or a completion.
    """
    run = folder if isinstance(folder, OpenRun) else open_run(folder)
    client = open_client(run, client_name)
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


# Export


def export_client(
    folder: str | Path | OpenRun,
    client_name: str,
    format: Format = "peft",
    out: str | Path | None = None,
) -> Path:
    """Write one client's model, as local training left it, for use elsewhere.

    Args:
      folder: the run's, or an open run.
      client_name: such as "minilm/0".
      format: "peft": an adapter for `PeftModel.from_pretrained`; beside it, in `base/`, the model it is
        for, where no published one is exactly that (pruned, quantised, random). "merged": a whole Hugging
        Face folder with the adapter merged in. "adapter": every trained array as it is, in
        adapter.safetensors, whose header says under "h2tune" what they are; always possible.
      out: the folder; None means RUN/export/CLIENT-FORMAT.

    Returns:
      The folder.
    """
    if format not in get_args(Format):
        raise FederationError(
            f"export: {format!r} is unknown; {near_match(format, get_args(Format))}"
        )
    run = folder if isinstance(folder, OpenRun) else open_run(folder)
    client = open_client(run, client_name)
    if out is None:
        out = run.folder / "export" / f"{client_name.replace('/', '-')}-{format}"
    out = Path(out)
    if format == "adapter":
        return _export_arrays(run, client, out)
    facts = run.federation.groups[client.cohort]
    if facts.model is None:
        raise FederationError(f"export: group {facts.name!r} has no model of ours")
    base = run.programs.bases[client.cohort]
    sites, head = client.adapters
    written = None
    try:
        if format == "merged":
            return models.export_merged(
                out, facts.model, base, sites, head,
                labels=facts.labels if head is not None and facts.labels else None,
                pad_token_id=getattr(facts.tokenizer, "pad_token_id", None),
                tokenizer=_tokenizer_folder(client.group.model),
            )  # fmt: skip
        published = _published(client.group.model)
        if published is None:
            written = models.export_merged(
                out / "base", facts.model, base, tokenizer=_tokenizer_folder(client.group.model)
            )
            published = str(written.resolve())
        return models.export_peft(out, facts.model, sites, head, base_model=published)
    except FederationError as error:
        if written is not None:
            shutil.rmtree(written)  # a base that no adapter follows
        raise FederationError(f"{error}. Format 'adapter' writes the arrays as they are") from None


def _published(model: ModelConfig) -> str | None:
    """Name the model that exists already with exactly these weights; None where there is none."""
    if model.prune is not None or model.dtype != "float32":
        return None
    if model.source in PUBLISHED:
        return PUBLISHED[model.source]
    if model.source.startswith("hub:"):
        return model.source.removeprefix("hub:")
    return model.source if Path(model.source).is_dir() else None


def _tokenizer_folder(model: ModelConfig) -> Path | None:
    """Find the folder of a model's tokenizer files, where there is one on the disk."""
    source = model.tokenizer or model.source
    if source == "minilm":
        from h2tune_jax.tasks import assets

        return assets.fetch("minilm")
    return Path(source) if Path(source).is_dir() else None


def _export_arrays(run: OpenRun, client: OpenClient, out: Path) -> Path:
    from safetensors.numpy import save_file

    leaves = jax.tree_util.tree_flatten_with_path(client.adapters)[0]
    arrays = {_dotted(path): np.ascontiguousarray(np.asarray(leaf)) for path, leaf in leaves}
    group = client.group
    facts = {
        "format": 1,
        "client": client.name,
        "group": group.name,
        "method": run.config.method.model_dump(mode="json"),
        "model": group.model.model_dump(mode="json", exclude_none=True),
        "task": group.task.model_dump(mode="json", exclude_none=True),
        "labels": list(run.federation.groups[client.cohort].labels),
        "rank": group.rank,
        "rounds": run.rounds,
        "config_digest": config_digest(run.config),
        "sites": {kind: _static_fields(site) for kind, site in client.adapters.sites.items()},
        "arrays": "layers lead; y = x W + scale * ((x a) + (x a) core) b where residual is true, "
        "scale * (x a) core b where it is not, scale * (x a) b without a core",
    }
    out.mkdir(parents=True, exist_ok=True)
    metadata = {"h2tune": json.dumps(facts, sort_keys=True)}
    save_file(arrays, out / "adapter.safetensors", metadata=metadata)
    return out


def _dotted(path: Any) -> str:
    parts = [getattr(key, "name", None) or getattr(key, "key", None) for key in path]
    parts = [
        str(getattr(key, "idx", "")) if part is None else part for key, part in zip(path, parts)
    ]
    return ".".join(map(str, parts))


def _static_fields(site: Any) -> dict[str, Any]:
    """Read what a site holds beside arrays: its class, and numbers such as its scale."""
    found: dict[str, Any] = {"class": type(site).__name__}
    if dataclasses.is_dataclass(site):
        for field in dataclasses.fields(site):
            value = getattr(site, field.name)
            if isinstance(value, bool | int | float | str):
                found[field.name] = value
    return found

"""One client's model, written for use elsewhere."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from h2tune_jax import models
from h2tune_jax.run.config import config_digest
from h2tune_jax.run.disk import whole_folder, writing
from h2tune_jax.run.settings import ModelConfig
from h2tune_jax.run.use import OpenClient, OpenRun, open_with
from h2tune_jax.types import FederationError, near_match

Format = Literal["peft", "merged", "adapter"]

PUBLISHED = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
"""Hub names of fetched models whose published weights are exactly those that we read."""


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
      out: the folder; None means RUN/export/CLIENT-FORMAT. What it holds beside stays as it is.

    Returns:
      The folder. Its files are there when all of them are whole, and none of them before.
    """
    if format not in get_args(Format):
        raise FederationError(
            f"export: {format!r} is unknown; {near_match(format, get_args(Format))}"
        )
    run, client = open_with(folder, client_name)
    if out is None:
        out = run.folder / "export" / f"{client_name.replace('/', '-')}-{format}"
    out = Path(out)
    with writing("the export", out, again="export again"), whole_folder(out) as part:
        if format == "adapter":
            _write_arrays(run, client, part)
        else:
            try:
                _write_model(run, client, format, part, out)
            except FederationError as error:
                raise FederationError(
                    f"{error}. Format 'adapter' writes the arrays as they are"
                ) from None
    return out


def _write_model(run: OpenRun, client: OpenClient, format: Format, part: Path, out: Path) -> None:
    facts = run.federation.groups[client.cohort]
    if facts.model is None:
        raise FederationError(f"export: group {facts.name!r} has no model of ours")
    base, (sites, head) = run.programs.bases[client.cohort], client.adapters
    tokenizer = _tokenizer_folder(client.group.model)
    if format == "merged":
        models.export_merged(
            part, facts.model, base, sites, head,
            labels=facts.labels if head is not None and facts.labels else None,
            pad_token_id=getattr(facts.tokenizer, "pad_token_id", None),
            tokenizer=tokenizer,
        )  # fmt: skip
        return
    published = _published(client.group.model)
    if published is not None:
        models.export_peft(part, facts.model, sites, head, base_model=published)
        return
    beside = models.export_merged(part / "base", facts.model, base, tokenizer=tokenizer)
    models.export_peft(part, facts.model, sites, head, base_model=str(beside))
    # It names its base by where that will lie.
    file = part / "adapter_config.json"
    fields = {
        **json.loads(file.read_text()),
        "base_model_name_or_path": str(out.resolve() / "base"),
    }
    file.write_text(json.dumps(fields, indent=2) + "\n")


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


def _write_arrays(run: OpenRun, client: OpenClient, part: Path) -> None:
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
        "scale * (x a) core b where it is not, scale * (x a) b without a core; of class ParallelSite: "
        "y = x W + scale * (x a) b + (x u) core v",
    }
    metadata = {"h2tune": json.dumps(facts, sort_keys=True)}
    save_file(arrays, part / "adapter.safetensors", metadata=metadata)


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

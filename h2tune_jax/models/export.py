"""Export of a trained client: a PEFT adapter folder, or a merged Hugging Face folder.

Both hold what the matching `transformers` class computes, so a pooling of our own cannot go with them.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax.adapters.site import SiteAdapter
from h2tune_jax.models.families import family_of, hf_fields
from h2tune_jax.models.model import Model
from h2tune_jax.models.tensors import get_leaf
from h2tune_jax.types import FederationError, PyTree

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "preprocessor_config.json",
)


class Lora(NamedTuple):
    """One torch module's adapter over all layers: scale * x A B."""

    a: np.ndarray  # f32[Li, D, r]
    b: np.ndarray  # f32[Li, r, F]
    scale: float

    @property
    def rank(self) -> int:
        """Rank r of the module's pair."""
        return self.a.shape[-1]


def export_peft(
    folder: str | Path,
    model: Model,
    sites: Mapping[str, SiteAdapter],
    head: PyTree = None,
    *,
    base_model: str = "",
) -> Path:
    """Write an adapter that `PeftModel.from_pretrained` loads onto the unadapted torch model.

    Args:
      folder: where to; made if need be.
      model: what the adapters were trained on.
      sites: kind -> folded into an ordinary LoRA pair; anything that has `fold()` and `scale`.
      head: the classifier's parameters, saved with the adapter; None for a language model.
      base_model: hub id or folder of the base, noted in the adapter's config. For a depth-pruned
        model it has to be a folder that holds the pruned base, as `export_merged` writes it.

    Returns:
      The folder.
    """
    from safetensors.numpy import save_file

    family = family_of(model.config)
    _check_head(model, head)
    _check_pruned(model, base_model)
    modules = fold_modules(model, sites)
    if not modules:
        raise FederationError("export: there are no adapted sites to write")
    prefix = "base_model.model." + _prefix(model, head)
    tensors = {}
    for module, lora in modules.items():
        for i in range(model.config.num_layers):
            name = f"{prefix}{family.layer_module.format(i)}.{module}"
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(lora.a[i].T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(lora.b[i].T)
    for name, array in _head_tensors(model, head).items():
        tensors["base_model.model." + name] = array

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = _peft_fields(model, modules, head, base_model)
    (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return folder


def export_merged(
    folder: str | Path,
    model: Model,
    base: PyTree,
    sites: Mapping[str, SiteAdapter] | None = None,
    head: PyTree = None,
    *,
    labels: Sequence[str] | None = None,
    pad_token_id: int | None = None,
    tokenizer: str | Path | None = None,
) -> Path:
    """Write a Hugging Face folder whose weights have the adapters merged in.

    Args:
      folder: where to; made if need be.
      model, base, sites, head: as trained; without sites the base goes out as it is.
      labels: names of the classes, in the order of the head's outputs.
      pad_token_id: written to the config; a classifier on a causal model needs one for batches.
      tokenizer: a folder whose tokenizer files are copied along.

    Returns:
      The folder.
    """
    from safetensors.numpy import save_file

    config, family = model.config, family_of(model.config)
    _check_head(model, head)
    modules = fold_modules(model, sites or {})
    prefix = _prefix(model, head)
    patch = (config.channels, config.patch_size)
    updates: dict[
        tuple[str, ...], str
    ] = {  # path of the weight -> its torch module, for those with an adapter
        ("layers", *path, "w"): module
        for path, module in family.sites.values()
        if module in modules
    }
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for entry in family.tensors_fn(config):
        if entry.path[0] == "unembed" and head is not None:
            continue
        leaf = np.asarray(get_leaf(base, entry.path))
        lora = modules.get(updates.get(entry.path, ""))
        for i in range(config.num_layers if entry.stacked else 1):
            one = leaf[i] if entry.stacked else leaf
            if lora is not None:
                b = lora.b[i]
                if entry.part is not None:
                    b = np.split(b, entry.part[1], axis=-1)[entry.part[0]]
                one = (one.astype(np.float32) + lora.scale * (lora.a[i] @ b)).astype(leaf.dtype)
            name = entry.name.format(i)
            name = name if name.startswith("lm_head.") else prefix + name
            piece = (0 if entry.part is None else entry.part[0], entry.write(one, patch))
            pieces.setdefault(name, []).append(piece)
    tensors = {
        name: np.ascontiguousarray(
            np.concatenate([array for _, array in sorted(parts, key=lambda p: p[0])], axis=-1)
            if len(parts) > 1
            else parts[0][1]
        )
        for name, parts in pieces.items()
    }
    tensors.update(_head_tensors(model, head))

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = _hf_fields(model, base, head, labels, pad_token_id)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (Path(tokenizer) / name).is_file():
                shutil.copyfile(Path(tokenizer) / name, folder / name)
    return folder


def fold_modules(model: Model, sites: Mapping[str, Any]) -> dict[str, Lora]:
    """Fold adapters into one LoRA pair a torch module.

    Where torch fuses sites into one module (GPT-2's c_attn), their pairs become one: A = [A_q A_k A_v],
    B block-diagonal, the rank the sum of theirs.
    """
    family, shapes = family_of(model.config), model.spec.shapes
    parts = {entry.path: entry.part for entry in family.tensors_fn(model.config)}
    modules: dict[str, list[tuple[str, tuple[int, int] | None]]] = {}
    for kind, (path, module) in family.sites.items():
        if kind in sites:
            modules.setdefault(module, []).append((kind, parts["layers", *path, "w"]))
    unknown = sorted(set(sites) - set(family.sites))
    if unknown:
        raise FederationError(f"export: {model.config.arch} has no site {unknown[0]!r}")

    result = {}
    for module, members in modules.items():
        scale = float(sites[members[0][0]].scale)
        a_parts, b_parts = [], []
        for kind, part in members:
            site = sites[kind]
            if not callable(getattr(site, "fold", None)):
                raise FederationError(
                    f"export: site {kind!r} holds a {type(site).__name__}, which is no LoRA pair"
                )
            a, b = (np.asarray(x, np.float32) for x in site.fold())
            layers, (d, f) = model.config.num_layers, shapes[kind]
            if a.shape[:-1] != (layers, d) or b.shape != (layers, a.shape[-1], f):
                raise FederationError(
                    f"export: site {kind!r} has factors {a.shape} and {b.shape}, the model needs "
                    f"({layers}, {d}, r) and ({layers}, r, {f})"
                )
            if part is not None:
                wide = np.zeros((layers, a.shape[-1], f * part[1]), np.float32)
                wide[..., part[0] * f : (part[0] + 1) * f] = b * (float(site.scale) / scale)
                b = wide
            a_parts.append(a)
            b_parts.append(b)
        result[module] = Lora(
            np.concatenate(a_parts, axis=-1), np.concatenate(b_parts, axis=-2), scale
        )
    return result


def _check_head(model: Model, head: PyTree) -> None:
    if head is not None and model.config.pooling != "native":
        raise FederationError(
            f"export: pooling {model.config.pooling!r} is ours alone; "
            f"{family_of(model.config).classifier_class} cannot compute it. "
            "Train with pooling='native' to export a classifier"
        )
    if head is not None:
        names = {name for name, _ in family_of(model.config).head.modules}
        if set(head) != names:
            raise FederationError(
                f"export: the head has parts {sorted(head)}, the class needs {sorted(names)}"
            )


def _check_pruned(model: Model, base_model: str) -> None:
    """On the whole model, a pruned one's adapter would load without a word, in the wrong layers."""
    if not model.config.kept:
        return
    file = Path(base_model or ".") / "config.json"
    fields = json.loads(file.read_text()) if base_model and file.is_file() else {}
    if model.config.num_layers not in (fields.get("num_hidden_layers"), fields.get("n_layer")):
        raise FederationError(
            "export: the model is depth-pruned, so its adapter fits no published base. Write the pruned "
            "base with export_merged and give that folder as base_model, or export it merged"
        )


def _prefix(model: Model, head: PyTree) -> str:
    family = family_of(model.config)
    bare = head is None and _causal_class(model) is None
    return "" if bare else family.prefix + "."


def _causal_class(model: Model) -> str | None:
    return None if model.config.unembed == "none" else family_of(model.config).causal_class


def _head_tensors(model: Model, head: PyTree) -> dict[str, np.ndarray]:
    tensors = {}
    if head is not None:
        for name, module in family_of(model.config).head.modules:
            tensors[f"{module}.weight"] = np.ascontiguousarray(
                np.asarray(head[name]["w"], np.float32).T
            )
            if "b" in head[name]:
                tensors[f"{module}.bias"] = np.asarray(head[name]["b"], np.float32)
    return tensors


def _peft_fields(
    model: Model, modules: Mapping[str, Lora], head: PyTree, base_model: str
) -> dict[str, Any]:
    family = family_of(model.config)
    rank = Counter(lora.rank for lora in modules.values()).most_common(1)[0][0]
    alphas = {module: lora.scale * lora.rank for module, lora in modules.items()}
    alpha = Counter(a for m, a in alphas.items() if modules[m].rank == rank).most_common(1)[0][0]
    if head is not None:
        task = "SEQ_CLS" if family.classifier_class.endswith("SequenceClassification") else None
    else:
        task = "CAUSAL_LM" if _causal_class(model) else "FEATURE_EXTRACTION"
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": _number(alpha),
        "rank_pattern": {m: lora.rank for m, lora in modules.items() if lora.rank != rank},
        "alpha_pattern": {m: _number(a) for m, a in alphas.items() if a != alpha},
        "target_modules": _targets(model, modules),
        "modules_to_save": None if head is None else [family.head.root],
        "fan_in_fan_out": any(
            entry.form == "same" and entry.path[1:-1] in {p for p, _ in family.sites.values()}
            for entry in family.tensors_fn(model.config)
            if entry.path[-1] == "w"
        ),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _targets(model: Model, modules: Mapping[str, Lora]) -> list[str] | str:
    """Name the adapted modules by their ends; by a pattern where an end would match others too."""
    family = family_of(model.config)
    layer = family.layer_module
    others = {module for _, module in family.sites.values()} - set(modules)
    if any(f".{other}".endswith(f".{module}") for module in modules for other in others):
        ends = "|".join(module.replace(".", r"\.") for module in sorted(modules))
        return (
            rf".*{layer.format('#').replace('.', chr(92) + '.').replace('#', '[0-9]+')}\.({ends})"
        )
    return sorted(modules)


def _hf_fields(
    model: Model,
    base: PyTree,
    head: PyTree,
    labels: Sequence[str] | None,
    pad_token_id: int | None,
) -> dict[str, Any]:
    config, family = model.config, family_of(model.config)
    if head is not None:
        name = family.classifier_class
    else:
        name = _causal_class(model) or family.classifier_class.split("For")[0] + "Model"
    fields = hf_fields(config)
    fields["architectures"] = [name]
    fields["dtype"] = str(np.asarray(base["layers"]["attention"]["q"]["w"][:1, :1, :1]).dtype)
    fields.pop("torch_dtype", None)
    if pad_token_id is not None:
        fields["pad_token_id"] = pad_token_id
    if head is not None:
        count = head[family.head.modules[-1][0]]["w"].shape[-1]
        names = [f"LABEL_{i}" for i in range(count)] if labels is None else list(labels)
        if len(names) != count:
            raise FederationError(f"export: {len(names)} labels for a head of {count} outputs")
        fields["id2label"] = {str(i): label for i, label in enumerate(names)}
        fields["label2id"] = {label: i for i, label in enumerate(names)}
    return fields

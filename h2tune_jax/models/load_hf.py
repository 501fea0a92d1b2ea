"""Import of Hugging Face folders: `config.json`, safetensors in one or many files, a tokenizer."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from h2tune_jax.models import safetensors_file
from h2tune_jax.models.config import ModelConfig
from h2tune_jax.models.families import config_from_hf, family_of
from h2tune_jax.models.model import Model, base_shapes, build
from h2tune_jax.models.tensors import Tensor, get_leaf, leaf_paths, set_leaf
from h2tune_jax.types import FederationError, PyTree

log = logging.getLogger(__name__)

ReadFn = Callable[[str], np.ndarray]


def load_hf(
    source: str | Path, *, param_dtype: str | None = None, **choices: Any
) -> tuple[Model, PyTree]:
    """Import a model from a Hugging Face folder, or by hub id when no such folder exists.

    Args:
      source: a folder with `config.json` and safetensors files, or a hub id.
      param_dtype: dtype of the base; the compute dtype if not given.
      **choices: dtype ("float32", "bfloat16"), remat, pooling, attention: see `ModelConfig`.

    Returns:
      (model, base): the functions, and the frozen weights stacked over layers.

    Raises:
      FederationError: names what is missing, unexpected, misshapen or unsupported.
    """
    folder, config, stored = _open(source, choices)
    shapes = {name: entry.shape for name, entry in stored.items()}
    base = assemble(
        config, shapes, lambda name: stored[name].read(name), str(folder), param_dtype=param_dtype
    )
    return build(config), base


def read_config(source: str | Path, **choices: Any) -> ModelConfig:
    """Return the config of the model that `load_hf` imports, reading no weight."""
    return _open(source, choices)[1]


def _open(
    source: str | Path, choices: Mapping[str, Any]
) -> tuple[Path, ModelConfig, dict[str, safetensors_file.Stored]]:
    """Find a model: -> (its folder, its config, where its tensors lie by name)."""
    folder = find_folder(source)
    fields = read_json(folder / "config.json")
    config = config_from_hf(fields, **choices)
    stored = strip_names(index_folder(folder), config)
    if config.unembed == "own" and "lm_head.weight" not in stored:
        if any(name.endswith("ForCausalLM") for name in fields.get("architectures") or ()):
            raise FederationError(f"{folder}: tensor 'lm_head.weight' is missing")
        config = dataclasses.replace(config, unembed="none")
    return folder, config, stored


def find_folder(source: str | Path) -> Path:
    """Return the folder itself, or that of a downloaded hub snapshot."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FederationError(f"{folder}: config.json is missing")
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or str(source).startswith("."):
        raise FederationError(f"{source}: no such folder")
    import huggingface_hub

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:
        raise FederationError(
            f"{source}: no such folder, and the hub did not give it: {type(error).__name__}: {error}"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FederationError(f"{file}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise FederationError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    return fields


def index_folder(folder: Path) -> dict[str, safetensors_file.Stored]:
    """List all tensors of a folder, of its one file or of those that its index names."""
    listing = folder / "model.safetensors.index.json"
    if listing.is_file():
        weight_map = read_json(listing).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise FederationError(f"{listing}: weight_map is missing")
        files = {
            name: safetensors_file.index(_existing(folder / name))
            for name in sorted(set(weight_map.values()))
        }
        tensors = {}
        for name, file in weight_map.items():
            if name not in files[file]:
                raise FederationError(f"{folder / file}: tensor {name!r} is missing")
            tensors[name] = files[file][name]
        return tensors
    return safetensors_file.index(_existing(folder / "model.safetensors"))


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FederationError(f"{file}: no such file (only safetensors are read)")
    return file


def strip_names(stored: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Bring names to the backbone's own: without prefix, in today's spelling."""
    family = family_of(config)
    result = {}
    for name, entry in stored.items():
        short = name.removeprefix(family.prefix + ".")
        for pattern, replacement in family.renamed:
            short = re.sub(pattern, replacement, short)
        if short in result:
            raise FederationError(f"tensor {short!r} is there twice, once as {name!r}")
        result[short] = entry
    return result


def assemble(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read_fn: ReadFn,
    where: str,
    *,
    param_dtype: str | None = None,
) -> PyTree:
    """Fill the base leaf by leaf from named tensors, after checking all names and shapes."""
    family, expected = family_of(config), base_shapes(config)
    entries = {entry.path: entry for entry in family.tensors_fn(config)}
    patch = (config.channels, config.patch_size)
    wanted: dict[str, tuple[int, ...]] = {}
    for path in leaf_paths(expected):
        entry, shape = entries[path], get_leaf(expected, path).shape
        one = shape[1:] if entry.stacked else shape
        for name in _names(entry, config.num_layers):
            wanted[name] = entry.file_shape(one, patch)
    for name, shape in wanted.items():
        if name not in shapes:
            hint = "; pooling='mean' does without" if name.startswith("pooler.") else ""
            raise FederationError(f"{where}: tensor {name!r} is missing{hint}")
        if tuple(shapes[name]) != shape:
            raise FederationError(
                f"{where}: tensor {name!r} has shape {tuple(shapes[name])}, the config says {shape}"
            )
    rest = sorted(set(shapes) - set(wanted))
    known = [name for name in rest if any(re.fullmatch(p, name) for p in family.ignored)]
    unexpected = sorted(set(rest) - set(known))
    if unexpected:
        more = f" (and {len(unexpected) - 1} more)" if len(unexpected) > 1 else ""
        raise FederationError(f"{where}: tensor {unexpected[0]!r} is unexpected{more}")
    if known:
        log.info("%s: not read, not this model's: %s", where, ", ".join(known))

    dtype = jax.numpy.dtype(param_dtype or config.dtype)
    base: dict[str, Any] = {}

    def tensor_size(path: tuple[str, ...]) -> int:
        shape = get_leaf(expected, path).shape
        return int(np.prod(shape[1:] if entries[path].stacked else shape, dtype=np.int64))

    # A tensor is there twice while it is copied: the largest go first, before the rest exists.
    for path in sorted(leaf_paths(expected), key=tensor_size, reverse=True):
        entry, shape = entries[path], get_leaf(expected, path).shape
        leaf = aligned(shape, dtype)
        one = shape[1:] if entry.stacked else shape
        for i, name in enumerate(_names(entry, config.num_layers)):
            (leaf[i] if entry.stacked else leaf)[...] = entry.read(read_fn(name), one)
        set_leaf(base, path, jax.device_put(leaf, may_alias=True))
    return base


def _names(entry: Tensor, num_layers: int) -> list[str]:
    if not entry.stacked:
        return [entry.name]
    return [entry.name.format(i) for i in range(num_layers)]


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocate an array at a multiple of 64 bytes, which JAX on the CPU takes over uncopied."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + size].view(dtype).reshape(shape)


def load_tokenizer(source: str | Path) -> Any:
    """Return the `transformers` tokenizer of a folder, a hub id or a .gguf file."""
    if str(source).endswith(".gguf"):
        from h2tune_jax.models.tokenizer_gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(source)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise FederationError(f"{source}: no tokenizer: {error}") from error

"""Import of GGUF files of the Llama family, dequantised."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from h2tune_jax.models.attention import rope_frequencies
from h2tune_jax.models.config import ModelConfig
from h2tune_jax.models.families import config_from_hf
from h2tune_jax.models.load_hf import assemble
from h2tune_jax.models.model import Model, build
from h2tune_jax.types import FederationError, PyTree, near_match

ARCHS = ("llama", "qwen2", "qwen3")

_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CHUNK = 1 << 22
"""Values dequantised at a time, so that the largest tensor needs no second copy in float32."""


def load_gguf(
    file: str | Path, *, param_dtype: str | None = None, **choices: Any
) -> tuple[Model, PyTree]:
    """Import a GGUF model of the Llama family, dequantised.

    Args:
      file: the .gguf file.
      param_dtype: dtype of the base; the compute dtype if not given.
      **choices: dtype, remat, pooling, attention: see `ModelConfig`.

    Returns:
      (model, base).

    Raises:
      FederationError: names what is missing, unexpected, misshapen or unsupported.
    """
    file = Path(file)
    config, tensors = _open(file, choices)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def read(name: str) -> np.ndarray:
        array = tensors[name].read(file, name)
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        for site, count in heads.items():
            if f"self_attn.{site}." in name and config.arch == "llama":
                array = unpermute(array, count)
        return array

    return build(config), assemble(config, shapes, read, str(file), param_dtype=param_dtype)


def read_config(file: str | Path, **choices: Any) -> ModelConfig:
    """Return the config of the model that `load_gguf` imports, reading no weight."""
    return _open(Path(file), choices)[0]


def _open(file: Path, choices: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, "_Located"]]:
    """Read what a file says of itself: -> (the model's config, where its tensors lie by name)."""
    import gguf

    if not file.is_file():
        raise FederationError(f"{file}: no such file")
    try:
        # Not kept: its lists of tokens take more memory than any tensor.
        reader = gguf.GGUFReader(file)
    except Exception as error:  # the reader raises whatever it trips over
        raise FederationError(f"{file}: truncated or not a GGUF file: {error}") from error

    tensors = {_rename(tensor.name): _locate(tensor) for tensor in reader.tensors}
    frequencies = tensors.pop("rope_freqs.weight", None)
    fields = _hf_fields(reader, tied="lm_head.weight" not in tensors, where=str(file))
    config = config_from_hf(fields, **choices)
    if frequencies is not None:
        given = frequencies.read(file, "rope_freqs.weight")
        fields["rope_scaling"] = _llama3_scaling(given, config, str(file))
        config = config_from_hf(fields, **choices)
    return config, tensors


class _Located(NamedTuple):
    """Where a quantised tensor lies; read from the file, as a map's pages would stay in memory."""

    shape: tuple[int, ...]
    kind: Any
    offset: int
    size: int

    def read(self, file: Path, name: str) -> np.ndarray:
        """Read and dequantise."""
        import gguf

        raw = np.fromfile(file, np.uint8, self.size, offset=self.offset)
        if raw.size != self.size:
            raise FederationError(f"{file}: truncated in tensor {name!r}")
        rows = raw.reshape(int(np.prod(self.shape[:-1], dtype=np.int64)), -1)
        result = np.empty((rows.shape[0], self.shape[-1]), np.float32)
        step = max(_CHUNK // self.shape[-1], 1)
        for i in range(0, rows.shape[0], step):
            result[i : i + step] = gguf.quants.dequantize(rows[i : i + step], self.kind)
        return result.reshape(self.shape)


def _locate(tensor: Any) -> _Located:
    shape = tuple(int(n) for n in tensor.shape[::-1])
    return _Located(shape, tensor.tensor_type, int(tensor.data_offset), int(tensor.n_bytes))


def unpermute(array: np.ndarray, num_heads: int) -> np.ndarray:  # [heads * H, ...]
    """Bring rotary pairs from neighbours (2i, 2i + 1), as GGUF keeps them, to (i, i + H/2)."""
    pairs = array.reshape(num_heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _hf_fields(reader: Any, *, tied: bool, where: str) -> dict[str, Any]:
    """Turn a GGUF file's metadata into a Hugging Face config dict."""

    def field(name: str, default: Any = ...) -> Any:
        entry = reader.get_field(name)
        if entry is None:
            if default is ...:
                raise FederationError(f"{where}: field {name!r} is missing")
            return default
        return entry.contents()

    arch = field("general.architecture")
    if arch not in ARCHS:
        raise FederationError(
            f"{where}: architecture {arch!r} is unsupported; {near_match(arch, ARCHS)}"
        )
    scaling = field(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise FederationError(f"{where}: {arch}.rope.scaling.type = {scaling!r} is unsupported")
    heads, width = field(f"{arch}.attention.head_count"), field(f"{arch}.embedding_length")
    class_name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[arch]
    tokens = reader.get_field("tokenizer.ggml.tokens")
    fields = {
        "model_type": arch,
        "architectures": [f"{class_name}ForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": field(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(f"{arch}.attention.head_count_kv", heads),
        "head_dim": field(f"{arch}.attention.key_length", width // heads),
        "intermediate_size": field(f"{arch}.feed_forward_length"),
        "max_position_embeddings": field(f"{arch}.context_length"),
        "rms_norm_eps": field(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": field(f"{arch}.rope.freq_base", 10000.0),
        "vocab_size": field(f"{arch}.vocab_size", None if tokens is None else len(tokens.data)),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = field(f"tokenizer.ggml.{theirs}_token_id", None)
        if number is not None:
            fields[f"{ours}_token_id"] = number
    return {name: int(v) if isinstance(v, np.integer) else v for name, v in fields.items()}


def _rename(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in _NAMES:
        return f"layers.{parts[1]}.{_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _NAMES:
        return f"{_NAMES[parts[0]]}.{parts[1]}"
    return name


def _llama3_scaling(given: np.ndarray, config: ModelConfig, where: str) -> dict[str, Any]:
    """Recognise the divisors that a Llama 3 file keeps of its rotary frequencies."""
    plain = rope_frequencies(config)
    for factor in (8.0, 32.0):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        scaled = dataclasses.replace(config, rope_scaling=tuple(sorted(scaling.items())))
        if given.shape == plain.shape and np.allclose(
            plain / rope_frequencies(scaled), given, rtol=1e-4
        ):
            return scaling
    raise FederationError(f"{where}: tensor 'rope_freqs.weight' is none of Llama 3's scalings")

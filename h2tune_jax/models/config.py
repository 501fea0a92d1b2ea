"""What a model is made of, independent of whose naming it came with."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from h2tune_jax.types import FederationError, near_match

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
DTYPES = ("float32", "bfloat16")
POOLINGS = ("native", "mean")
REMAT = ("full", "dots", "dots_no_batch")
ATTENTION = ("xla", "cudnn")
NORMS = ("layer", "rms", "rms_plus_one")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model of one family. Static and hashable.

    Attributes:
      arch: the architecture, named as `model_type` is in a Hugging Face config.
      width: d, the residual stream.
      num_layers: Li.
      num_heads, num_kv_heads, head_dim: of attention; `num_kv_heads < num_heads` groups queries.
      mlp_width: hidden width of the feed-forward part.
      gated: whether a gate multiplies the feed-forward part's hidden layer.
      activation: one of the values of `ACTIVATIONS`.
      norm: "layer", "rms", or "rms_plus_one", whose stored weight counts from 1 (Gemma).
      norm_eps: epsilon of every norm.
      post_norms: whether each branch is normed again before it is added (Gemma 2).
      embed_scale: factor on token embeddings (Gemma).
      vocab_size: V; 0 for images.
      max_positions: the longest input in tokens.
      type_vocab_size: number of segment embeddings, 0 for none.
      pad_id: id of the padding token, if the model has one.
      pooler: whether a pooler sits between hidden states and a classifier (BERT).
      unembed: where next-token logits come from: "tied", "own" weight, or "none".
      qkv_bias, o_bias, mlp_bias: which products have one.
      qk_norm: RMS norm on the heads of q and k (Qwen3).
      rope_theta: base period of the rotary embedding; None for learned positions.
      rope_scaling: (("rope_type", "llama3"), ("factor", 8.0), ...), or () for none.
      windows: sliding window of each layer, None for full attention; () for none anywhere.
      attention_scale: factor on q k^T.
      attention_cap, logit_cap: soft-capping of attention logits and of output logits (Gemma 2).
      image_size, patch_size, channels: of images (ViT).
      dtype: compute dtype; norms, softmax and heads stay in float32.
      remat: what a layer keeps for the backward pass: None everything, "full" nothing, "dots" the
        results of products, "dots_no_batch" those of products with weights.
      pooling: "native" is what the family's Hugging Face classifier does; "mean" averages the tokens.
      attention: implementation given to `jax.nn.dot_product_attention`; None leaves it to JAX.
      kept: which layers of the imported model these are; empty means all of them.
      kept_of: how many layers the imported model has, where these are some of them.
      source: the Hugging Face config as JSON; kept for export, no part of equality.
    """

    arch: str
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    gated: bool = False
    activation: str
    norm: str = "layer"
    norm_eps: float
    post_norms: bool = False
    embed_scale: float | None = None
    vocab_size: int
    max_positions: int
    type_vocab_size: int = 0
    pad_id: int | None = None
    pooler: bool = False
    unembed: str = "tied"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_theta: float | None = None
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    windows: tuple[int | None, ...] = ()
    attention_scale: float
    attention_cap: float | None = None
    logit_cap: float | None = None
    image_size: int = 0
    patch_size: int = 0
    channels: int = 0
    dtype: str = "float32"
    remat: str | None = None
    pooling: str = "native"
    attention: Literal["xla", "cudnn"] | None = None
    kept: tuple[int, ...] = ()
    kept_of: int | None = None
    source: str = dataclasses.field(default="{}", compare=False, repr=False)

    def __post_init__(self):
        for field, allowed in (
            ("dtype", DTYPES),
            ("pooling", POOLINGS),
            ("remat", (None, *REMAT)),
            ("attention", (None, *ATTENTION)),
            ("activation", tuple(ACTIVATIONS.values())),
            ("norm", NORMS),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise FederationError(
                    f"{field} {value!r} is unknown; {near_match(str(value), map(str, allowed))}"
                )
        for field in ("width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
            if getattr(self, field) < 1:
                raise FederationError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise FederationError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise FederationError(
                f"windows has {len(self.windows)} entries for {self.num_layers} layers"
            )
        if len({w for w in self.windows if w is not None}) > 1:
            raise FederationError(f"windows of different sizes are unsupported: {self.windows}")


class HfFields:
    """A Hugging Face config dict, read field by field with errors that name the field."""

    def __init__(self, fields: Mapping[str, Any]):
        self.fields = fields

    def take(self, name: str, kind: type, default: Any = ...) -> Any:
        """Return a field as `kind`; a missing or null one gives the default, or an error."""
        value = self.fields.get(name)
        if value is None:
            if default is ...:
                raise FederationError(f"config: {name} is missing")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FederationError(f"config: {name} must be of type {kind.__name__}, got {value!r}")
        return value

    def optional(self, name: str, kind: type, default: Any) -> Any:
        """Return a field as `kind`, None where it is null, and the default only where it is missing."""
        if name in self.fields and self.fields[name] is None:
            return None
        return self.take(name, kind, default)

    def activation(self, name: str, default: Any = ...) -> str:
        """Return an activation function by our name for it."""
        value = self.take(name, str, default)
        if value not in ACTIVATIONS:
            raise FederationError(
                f"config: {name} {value!r} is unsupported; {near_match(value, ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def refuse(self, name: str, *harmless: Any) -> None:
        """Raise if a field asks for something that this family's definition does not compute."""
        value = self.fields.get(name)
        if value is not None and value not in harmless:
            raise FederationError(f"config: {name} = {value!r} is unsupported")

    def rope(self) -> dict[str, Any]:
        """Read rotary settings in their new form (`rope_parameters`) or their old one."""
        new = self.take("rope_parameters", dict, {})
        theta = HfFields(new).take("rope_theta", float, self.take("rope_theta", float, 10000.0))
        given = HfFields(new or self.take("rope_scaling", dict, {}))
        kind = given.take("rope_type", str, given.take("type", str, "default"))
        if kind not in ROPE_TYPES:
            raise FederationError(
                f"config: rope_type {kind!r} is unsupported; {near_match(kind, ROPE_TYPES)}"
            )
        for fields in (self, given):
            fields.refuse("partial_rotary_factor", 1, 1.0)
        scaling: dict[str, Any] = {}
        if kind != "default":
            scaling = {"rope_type": kind, "factor": given.take("factor", float)}
        if kind == "llama3":
            length = given.take(
                "original_max_position_embeddings", int, self.take("max_position_embeddings", int)
            )
            scaling["original_max_position_embeddings"] = length
            for name in ("low_freq_factor", "high_freq_factor"):
                scaling[name] = given.take(name, float)
        return {"rope_theta": theta, "rope_scaling": tuple(sorted(scaling.items()))}

    def windows(
        self, default: Callable[[int], bool], *, missing: int | None = None
    ) -> tuple[int | None, ...]:
        """Read the sliding window of each layer; `default` says which have one if no list does.

        `missing` is the size where the config has no such field; null means that there is no window.
        """
        size = self.optional("sliding_window", int, missing) or 0
        count = self.take("num_hidden_layers", int)
        types = self.take("layer_types", list, None)
        if types is None:
            sliding = [default(i) for i in range(count)]
        else:
            known = ("full_attention", "sliding_attention")
            for name in types:
                if name not in known:
                    raise FederationError(
                        f"config: layer_types has {name!r}; {near_match(name, known)}"
                    )
            if len(types) != count:
                raise FederationError(
                    f"config: layer_types has {len(types)} entries for num_hidden_layers = {count}"
                )
            sliding = [name == "sliding_attention" for name in types]
        if not any(sliding):
            return ()
        if size < 1:
            raise FederationError("config: sliding_window is missing, but layers ask for one")
        return tuple(size if s else None for s in sliding)

    def json(self) -> str:
        """Return the whole dict as JSON text."""
        return json.dumps(dict(self.fields), sort_keys=True, default=str)

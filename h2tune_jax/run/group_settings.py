"""The settings of a group of clients: model, task, data partition, local work."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from h2tune_jax.types import near_match

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


def refuse(field: str, reason: str) -> PydanticCustomError:
    """Build the error of a contradiction; `field` is the key that the message points to."""
    return PydanticCustomError("contradiction", "{reason}", {"field": field, "reason": reason})


class Settings(pydantic.BaseModel):
    """Frozen, without unknown keys, without silent conversions."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        return {key: _freeze(value) for key, value in data.items()}


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def one_of(*words: str, number: type, least: float, what: str) -> BeforeValidator:
    """Accept one of the words, or a number of at least `least`: one error where a union gives two."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value in words:
            return value
        is_number = isinstance(value, int | number) and not isinstance(value, bool)
        if is_number and number(value) >= least:
            return number(value)
        raise PydanticCustomError(
            "choice",
            "expected {what}; {hint}",
            {"what": what, "hint": near_match(str(value), [*map(repr, words), what])},
        )

    return BeforeValidator(check)


class PruneConfig(Settings):
    """Which layers of the model stay: every n-th from the first on, the first n, or exactly these."""

    every: Count | None = None
    first: Count | None = None
    layers: tuple[Natural, ...] | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> "PruneConfig":
        given = [name for name in ("every", "first", "layers") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise refuse(
                given[-1] if given else "", f"give one of every, first and layers, not {found}"
            )
        return self


ROTARY = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""Families that tell positions by turning pairs of a head's numbers."""


class ShapeConfig(Settings):
    """The sizes of a model with random weights; its vocabulary is the tokenizer's."""

    family: str
    width: Count
    layers: Count
    heads: Count
    kv_heads: Count | None = None
    mlp_width: Count
    max_positions: Count = 512
    image_size: Count | None = None
    patch_size: Count | None = None
    channels: Count | None = None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "ShapeConfig":
        if self.width % self.heads:
            raise refuse("heads", f"width {self.width} is no multiple of heads {self.heads}")
        if self.heads % (self.kv_heads or 1):
            raise refuse(
                "kv_heads", f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}"
            )
        if self.family in ROTARY and self.width // self.heads % 2:
            raise refuse(
                "heads",
                f"width {self.width} gives {self.heads} heads an odd width each, and family "
                f"{self.family!r} turns pairs",
            )
        images = [getattr(self, n) is not None for n in ("image_size", "patch_size", "channels")]
        if any(images) != (self.family == "vit") or any(images) != all(images):
            raise refuse(
                "family", "family 'vit' and it alone needs image_size, patch_size, channels"
            )
        if self.image_size is not None and self.image_size % (self.patch_size or 1):
            raise refuse(
                "patch_size",
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}",
            )
        return self


class ModelConfig(Settings):
    """A frozen model.

    `source`: "minilm", "smollm2" (fetched), a Hugging Face folder, a .gguf file, "hub:owner/name", or
    "random" (then `shape` and, for text, `tokenizer`: one of these sources, or "bytes").
    """

    source: str
    prune: PruneConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    pooling: Literal["native", "mean"] | None = None
    """None: "mean" for minilm, whose makers pool so; else "native"."""
    remat: Literal["full", "dots", "dots_no_batch"] | None = None
    attention: Literal["xla", "cudnn"] | None = None
    shape: ShapeConfig | None = None
    tokenizer: str | None = None

    @pydantic.model_validator(mode="after")
    def _shape_goes_with_random(self) -> "ModelConfig":
        if self.source == "random":
            if self.shape is None:
                raise refuse("shape", "source 'random' needs a table shape with the model's sizes")
            if self.tokenizer is None and self.shape.family != "vit":
                raise refuse("tokenizer", "source 'random' needs a tokenizer, such as 'bytes'")
        elif self.shape is not None:
            raise refuse("shape", f"only source 'random' takes a shape, not {self.source!r}")
        return self

    @property
    def pools(self) -> str:
        """The pooling that is used."""
        return self.pooling or ("mean" if self.source == "minilm" else "native")


class PartitionConfig(Settings):
    """How a group's training rows are dealt out to its clients.

    "iid": at random. "draw": every client draws its own, and clients may share rows. "dirichlet": each
    class in shares drawn with `alpha`. "pathological": `classes` classes a client. "by_key": a client
    for each value of the field `key`, in sorted order; the first `count` of them.
    """

    kind: Literal["iid", "draw", "dirichlet", "pathological", "by_key"] = "iid"
    alpha: Positive | None = None
    classes: Count | None = None
    key: str | None = None
    min_examples: Count = 1

    @pydantic.model_validator(mode="after")
    def _options_of_kind(self) -> "PartitionConfig":
        needed = {"dirichlet": "alpha", "pathological": "classes", "by_key": "key"}
        for kind, field in needed.items():
            given = getattr(self, field) is not None
            if self.kind == kind and not given:
                raise refuse(field, f"partition {kind!r} needs {field}")
            if self.kind != kind and given:
                raise refuse(field, f"{field} belongs to partition {kind!r}, not {self.kind!r}")
        return self


class TaskConfig(Settings):
    """A task and its data.

    `data`: a data set of `tasks.corpora`, a .jsonl, .json, .csv, .tsv or .parquet file, or
    "hub:owner/name". The fields named here are read of its rows.
    """

    data: str
    kind: Literal["classification", "regression", "causal_lm", "multiple_choice"] = "classification"
    suite: str | None = None
    """How `data` is prepared first: "math/choice", "glue/sst2", ...; see `tasks.suites`."""
    train: Count | None = None
    """Examples a client; None: all that there are, dealt out."""
    validation: Natural = 0
    test: Count = 200
    held_out: Literal["shared", "own"] = "shared"
    """Whose test and validation rows: the same for all clients of the group (so many in all), or each
    client's own, dealt out with its training rows (so many each)."""
    max_length: Annotated[int, Field(ge=2)] = 64
    partition: PartitionConfig = PartitionConfig()
    labels: tuple[str, ...] | None = None
    """Label names in order; None: the data set's own, or all that occur, sorted."""
    text: str = "{text}"
    pair: str | None = None
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    label: str = "label"
    target: str = "target"
    choices: str = "choices"
    normalise: Literal["length", "sum"] = "length"
    split: str | None = None
    subset: str | None = None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "TaskConfig":
        if self.partition.kind in ("dirichlet", "pathological") and self.kind not in (
            "classification",
            "multiple_choice",
        ):
            raise refuse(
                "partition",
                f"partition {self.partition.kind!r} deals out by label: {self.kind} has none",
            )
        if self.partition.kind == "draw" and (self.train is None or self.held_out == "own"):
            field = "train" if self.train is None else "held_out"
            raise refuse(field, "partition 'draw' needs train, and held_out = 'shared'")
        if self.labels is not None and len(set(self.labels)) < 2:
            raise refuse("labels", "a label set needs two labels or more")
        for field, prefix in (("split", "hub:"), ("subset", "hub:")):
            if getattr(self, field) is not None and not self.data.startswith(prefix):
                raise refuse(field, f"{field} belongs to data 'hub:...', not {self.data!r}")
        return self


class BudgetConfig(Settings):
    """One round's local work: `epochs` over the client's own data, or `steps`; one epoch by default.

    `microbatches` splits every batch, to hold one part's activations at a time (equal results).
    """

    batch_size: Count = 16
    epochs: Count | None = None
    steps: Count | None = None
    shuffle: bool = True
    microbatches: Count = 1

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "BudgetConfig":
        if self.epochs is not None and self.steps is not None:
            raise refuse("steps", "give epochs or steps, not both")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", 1)
        if self.batch_size % self.microbatches:
            raise refuse(
                "microbatches",
                f"batch_size {self.batch_size} is no multiple of microbatches {self.microbatches}",
            )
        return self


class GroupConfig(Settings):
    """Clients of one model, rank and task: described once, `count` of them. One cohort."""

    name: Name
    count: Count = 1
    rank: Count
    alpha: Positive = 16.0
    targets: tuple[str, ...] | None = None
    dropout: Share = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    head_rate_factor: Positive = 1.0
    weight: Annotated[
        float | str,
        one_of("examples", number=float, least=0, what="a number of at least 0"),
    ] = 1.0
    """Of each client in the server's mean: a number, or "examples", how many it trains on."""
    model: ModelConfig
    task: TaskConfig
    budget: BudgetConfig = BudgetConfig()

    @property
    def client_names(self) -> tuple[str, ...]:
        """The names of its clients: "minilm/0", "minilm/1", ..."""
        return tuple(f"{self.name}/{i}" for i in range(self.count))

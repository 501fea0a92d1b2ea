"""What is measured: one case is one program on one size; a plan is a list of cases."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from h2tune_jax.types import FederationError, near_match


class Size(NamedTuple):
    """One client's local work, and how many clients a default plan gives the model."""

    batch: int
    length: int  # tokens an example; 0 where examples are no texts
    steps: int
    clients: int


class Facts(NamedTuple):
    """What the plan knows of a model.

    `on_cpu` and `elsewhere` are the sizes of a default case; `dtype` the base's and the computation's.
    """

    about: str
    on_cpu: Size
    elsewhere: Size
    dtype_on_cpu: str = "float32"
    dtype: str = "float32"


MODELS: dict[str, Facts] = {
    "mlp": Facts("784-128-62, FedAvg of all weights", Size(20, 0, 5, 100), Size(20, 0, 5, 1000)),
    "minilm": Facts("MiniLM-L6, real weights", Size(32, 32, 1, 16), Size(32, 32, 4, 64)),
    "smollm2": Facts(
        "SmolLM2-135M, real weights (dequantised Q4_1)",
        Size(4, 64, 1, 4),
        Size(8, 256, 2, 16),
        dtype="bfloat16",
    ),
    "llama-3.2-1b": Facts(
        "by shape, random weights",
        Size(1, 64, 1, 2),
        Size(8, 512, 2, 8),
        dtype_on_cpu="bfloat16",
        dtype="bfloat16",
    ),
    "llama-3.2-3b": Facts(
        "by shape, random weights",
        Size(1, 64, 1, 2),
        Size(4, 512, 2, 8),
        dtype_on_cpu="bfloat16",
        dtype="bfloat16",
    ),
    "tiny": Facts(
        "a BERT of 2 x 64, random weights: for smoke runs", Size(8, 16, 1, 4), Size(8, 16, 1, 4)
    ),
}
CLIENTS = (1, 16, 100, 1000, 10_000)
AXES = ("vmap", "scan")
NOT_OF_MLP = ("rank", "kernels", "length", "dtype", "method")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One program on one size; every field is a column of the rows that it gives.

    Attributes:
      model: one of `MODELS`.
      clients: C, all of which take part.
      axis: client axis as in `make_round`: "vmap", "scan" or the size of a chunk, as text.
      rank: of the adapters; 0 where there are none.
      kernels: "xla" or "triton".
      devices: the round is split over so many.
      batch, length, steps: one client's work in a round.
      dtype: of the base and the computation.
      method: "fedavg" (the MLP), "fedit" (averaged LoRA) or "h2tune" (alternating).
    """

    model: str
    clients: int
    axis: str
    rank: int
    kernels: str
    devices: int
    batch: int
    length: int
    steps: int
    dtype: str
    method: str

    def __post_init__(self):
        for field, allowed in (
            ("model", MODELS),
            ("kernels", ("xla", "triton")),
            ("dtype", ("float32", "bfloat16")),
            ("method", ("fedavg", "fedit", "h2tune")),
        ):
            value = getattr(self, field)
            if value not in allowed:
                raise FederationError(f"{field} {value!r}: {near_match(value, allowed)}")
        if self.axis not in AXES and not (self.axis.isdigit() and int(self.axis) > 0):
            raise FederationError(
                f"axis {self.axis!r}: allowed: {', '.join(AXES)} or the size of a chunk"
            )
        for field in ("clients", "devices", "batch", "steps"):
            if getattr(self, field) < 1:
                raise FederationError(f"{field} must be at least 1, got {getattr(self, field)}")
        if (self.method == "fedavg") != (self.model == "mlp"):
            raise FederationError("method fedavg is for the mlp, and nothing else is for it")
        if self.kernels == "triton" and self.method == "fedit":
            raise FederationError(
                "kernels triton: a plain LoRA has no core, and so no kernel; take h2tune"
            )
        if self.model != "mlp" and self.rank < 1:
            raise FederationError(f"rank must be at least 1, got {self.rank}")

    @property
    def title(self) -> str:
        """What it is called in print."""
        parts = [self.model, f"{self.clients} clients", self.axis]
        parts += [f"r={self.rank}"] if self.rank else []
        parts += [self.method] if self.method == "h2tune" else []
        parts += [self.kernels] if self.kernels != "xla" else []
        parts += [f"{self.devices} devices"] if self.devices > 1 else []
        return " ".join(parts)


def default_case(model: str, backend: str, **changes) -> Case:
    """Give a model's case on a backend ("cpu", "gpu", ...), with changes."""
    if model not in MODELS:
        raise FederationError(f"model {model!r}: {near_match(model, MODELS)}")
    facts, cpu = MODELS[model], backend == "cpu"
    size = facts.on_cpu if cpu else facts.elsewhere
    mlp = model == "mlp"
    values = {
        **size._asdict(),
        "model": model,
        "axis": "scan" if cpu else "vmap",
        "rank": 0 if mlp else 8,
        "kernels": "xla",
        "devices": 1,
        "dtype": facts.dtype_on_cpu if cpu else facts.dtype,
        "method": "fedavg" if mlp else "fedit",
    }
    return Case(**(values | changes))


def default_plan(backend: str, devices: int) -> list[Case]:
    """Vary one thing at a time round each model's default case."""
    case = lambda model, **changes: default_case(model, backend, **changes)
    many = sorted({2, devices} - {1})
    plan = [case("mlp", clients=clients) for clients in CLIENTS]
    plan += [case("mlp", axis=axis) for axis in ("vmap", "scan", "16")]
    plan += [case("mlp", devices=count) for count in many]
    minilm = case("minilm")
    plan += [case("minilm", clients=clients) for clients in (1, 4, minilm.clients)]
    plan += [case("minilm", axis=axis) for axis in ("vmap", "scan", "4")]
    plan += [case("minilm", rank=rank) for rank in (4, 8, 32)]
    plan += [case("minilm", devices=count) for count in many]
    pair = lambda model: [case(model, method="h2tune", kernels=name) for name in ("xla", "triton")]
    plan += pair("minilm")
    for model in ("smollm2", "llama-3.2-1b", "llama-3.2-3b"):
        plan += [case(model), *pair(model)]
    return list(dict.fromkeys(plan))


def quick_plan(backend: str) -> list[Case]:
    """Give a smoke run: every part of the command once, in seconds."""
    return [
        default_case("mlp", backend, clients=8),
        default_case("tiny", backend, axis="2"),
        default_case("tiny", backend, method="h2tune", kernels="triton"),
        default_case("llama-3.2-3b", backend, clients=1_000_000),
    ]


def product_plan(backend: str, models: Iterable[str], **choices: Sequence) -> list[Case]:
    """Combine all given values of all given fields; the others stay at each model's default.

    What makes no difference to the MLP stays there as it is.
    """
    plan = []
    for model in models:
        own = {
            field: values
            for field, values in choices.items()
            if not (model == "mlp" and field in NOT_OF_MLP)
        }
        plan += [
            default_case(model, backend, **dict(zip(own, values)))
            for values in itertools.product(*own.values())
        ]
    return list(dict.fromkeys(plan))

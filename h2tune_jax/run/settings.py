"""What a run can be told: frozen settings that refuse unknown keys, wrong types and contradictions.

`docs/run.md` is the reference for users; `run.config` reads these from TOML and turns what pydantic
says into messages with file, line and key. A group's settings are in `run.group_settings`; all of them
can be imported from here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from h2tune_jax.run.group_settings import (
    BudgetConfig,
    Count,
    GroupConfig,
    ModelConfig,
    Natural,
    PartitionConfig,
    PruneConfig,
    Settings,
    ShapeConfig,
    TaskConfig,
    one_of,
    refuse,
)
from h2tune_jax.types import near_match

__all__ = [
    "METRICS",
    "BudgetConfig",
    "CheckpointConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GroupConfig",
    "LogConfig",
    "MethodConfig",
    "ModelConfig",
    "NewcomersConfig",
    "PartitionConfig",
    "ProbeConfig",
    "PruneConfig",
    "RunConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Settings",
    "ShapeConfig",
    "StopConfig",
    "StoreConfig",
    "TaskConfig",
]

METRICS = {
    "classification": ("accuracy", "loss"),
    "regression": ("mae", "loss"),
    "causal_lm": ("token_accuracy", "loss"),
    "multiple_choice": ("accuracy", "loss"),
}
"""What the loss functions of each kind of task report."""

LOWER_IS_BETTER = ("loss", "mae")


class MethodConfig(Settings):
    """The federated method. Every further key is an option of its factory; see `run.catalog`."""

    model_config = pydantic.ConfigDict(extra="allow")

    name: str
    rank: Count | None = None
    """Rank of every group that gives none of its own."""

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method's factory."""
        return dict(self.__pydantic_extra__ or {})


class SamplingConfig(Settings):
    """Who takes part in a round.

    `count` or `fraction` is taken of every group, so that a round's shapes stay the same: all of a
    group that has fewer, and at least one of each. "uniform" draws without replacement, "weight" in
    proportion to the clients' weights. "schedule" lists the rounds' client names ("group/0"), and
    begins again when it is through.
    """

    kind: Literal["all", "uniform", "weight", "schedule"] = "all"
    count: Count | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: tuple[tuple[str, ...], ...] | None = None

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "SamplingConfig":
        draws = self.kind in ("uniform", "weight")
        if draws and (self.count is None) == (self.fraction is None):
            raise refuse("count", f"sampling {self.kind!r} needs one of count and fraction")
        for field in ("count", "fraction"):
            if not draws and getattr(self, field) is not None:
                raise refuse(field, f"{field} belongs to sampling 'uniform' and 'weight'")
        if self.kind == "schedule" and not self.schedule:
            raise refuse("schedule", "sampling 'schedule' needs a schedule: a list of rounds")
        if self.kind != "schedule" and self.schedule is not None:
            raise refuse("schedule", f"schedule belongs to sampling 'schedule', not {self.kind!r}")
        return self


class NewcomersConfig(Settings):
    """Clients that never take part: the last so many of each group. At every evaluation they start anew,
    download, train for so many steps, and are tested; the run itself does not notice.
    """

    count: Count
    steps: Count


class EvaluationConfig(Settings):
    """When clients are tested, at which moments, and on what. The last round always is.

    `every = 0`: at the end only. Moments: "trained" (as local training left the client) and
    "downloaded" (right after download). `before`: also before the first round.
    """

    every: Natural = 1
    moments: tuple[Literal["trained", "downloaded"], ...] = ("trained",)
    newcomers: NewcomersConfig | None = None
    split: Literal["test", "validation"] = "test"
    clients: Literal["all", "participants"] = "all"
    """Who is tested: all who may train, or those of the round just over (for very many clients)."""
    batch_size: Count = 50
    before: bool = False

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "EvaluationConfig":
        if not self.moments or len(set(self.moments)) < len(self.moments):
            raise refuse("moments", "name each moment once, and at least one")
        return self


class Judged(Settings):
    """What goes by a metric: higher is better, but for losses and errors, unless `mode` is given."""

    metric: str = "accuracy"
    mode: Literal["max", "min"] = "max"

    @pydantic.model_validator(mode="after")
    def _falls(self) -> "Judged":
        if "mode" not in self.model_fields_set and self.metric in LOWER_IS_BETTER:
            object.__setattr__(self, "mode", "min")
        return self


class CheckpointConfig(Judged):
    """When the run is saved, and what is kept: the last few, and the best by a metric.

    The metric is its mean over the groups at the first moment of `evaluation.moments`. Without one it
    is "accuracy", or "loss" where a group's task has no accuracy.
    """

    every: Count = 1
    keep_last: Count = 3
    keep_best: Natural = 1


class StoreConfig(Settings):
    """Where clients' personal state lives: all on the device, or the seen ones in memory or a file."""

    kind: Literal["device", "host", "file"] = "device"


class ScheduleConfig(Settings):
    """Learning rates over rounds: what every rate of the method is multiplied by.

    It rises over `warmup` rounds (the first of them at 1 / warmup) and falls to `final` at the last
    round as a half cosine or a line.
    """

    kind: Literal["constant", "cosine", "linear"] = "constant"
    warmup: Natural = 0
    final: Annotated[float, Field(ge=0, le=1)] = 0.0


class StopConfig(Judged):
    """Stop when the metric has not got better by `min_delta` for `patience` evaluations."""

    patience: Count = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class LogConfig(Settings):
    """What people see; nothing here changes a result."""

    display: bool = True
    tensorboard: bool = False
    wandb: bool = False


class EngineConfig(Settings):
    """How the clients of a group run; see `make_round` and `CohortSpec.kernels`."""

    client_axis: Annotated[
        str | int, one_of("auto", "vmap", "scan", number=int, least=1, what="a chunk size")
    ] = "auto"
    devices: Count | None = None
    kernels: Literal["auto", "triton", "xla"] = "auto"


class ProbeConfig(Settings):
    """Public texts that every group's model reads at the start, for methods that ask for a probe.

    `data` is as in a task; `count` of its texts are taken.
    """

    data: str
    count: Count = 64
    text: str = "{text}"
    max_length: Annotated[int, Field(ge=2)] = 64


class RunConfig(Settings):
    """A whole run."""

    name: str = "run"
    seed: Natural = 0
    rounds: Count
    method: MethodConfig
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    store: StoreConfig = StoreConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    stop: StopConfig | None = None
    log: LogConfig = LogConfig()
    engine: EngineConfig = EngineConfig()
    probe: ProbeConfig | None = None
    groups: tuple[GroupConfig, ...]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _fill_ranks(cls, data: Any) -> Any:
        """Give the method's rank to groups without one."""
        method = data.get("method") if isinstance(data, Mapping) else None
        rank = method.get("rank") if isinstance(method, Mapping) else getattr(method, "rank", None)
        groups = data.get("groups") if isinstance(data, Mapping) else None
        if rank is None or not isinstance(groups, list | tuple):
            return data
        fill = lambda g: {"rank": rank, **g} if isinstance(g, Mapping) else g
        return {**data, "groups": tuple(map(fill, groups))}

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        if not self.groups:
            raise refuse("groups", "a run needs one table [[groups]] or more")
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            again = next(i for i, name in enumerate(names) if name in names[:i])
            raise refuse(f"groups.{again}.name", f"two groups are called {names[again]!r}")
        if self.schedule.warmup >= self.rounds and self.schedule.warmup > 0:
            raise refuse(
                "schedule.warmup",
                f"{self.schedule.warmup} rounds of warm-up leave none of {self.rounds}",
            )
        if self.stop is not None and not self.evaluation.every:
            raise refuse(
                "evaluation.every",
                "0 tests at the end alone, where [stop] has nothing left to stop; give "
                "evaluation.every, or leave [stop] out",
            )
        new = self.evaluation.newcomers
        for group in self.groups:
            if new is not None and new.count >= group.count:
                raise refuse(
                    "evaluation.newcomers.count",
                    f"{new.count} newcomers leave none of the {group.count} clients of group "
                    f"{group.name!r} to train",
                )
        self._check_schedule()
        if self.evaluation.split == "validation":
            for i, group in enumerate(self.groups):
                if not group.task.validation:
                    raise refuse(
                        f"groups.{i}.task.validation",
                        f"evaluation.split is 'validation', but group {group.name!r} has no such rows",
                    )
        shared = set.intersection(*(set(METRICS[group.task.kind]) for group in self.groups))
        for field in ("checkpoints", "stop"):
            self._settle_metric(field, shared)
        return self

    def _check_schedule(self) -> None:
        """Refuse a schedule that names somebody who cannot take part."""
        if self.sampling.schedule is None:
            return
        new = self.evaluation.newcomers
        first_new = lambda group: group.count - (0 if new is None else new.count)
        known = {
            name: place < first_new(group)
            for group in self.groups
            for place, name in enumerate(group.client_names)
        }
        for i, chosen in enumerate(self.sampling.schedule):
            for name in chosen:
                if name not in known:
                    hint = near_match(name, list(known)[:20])
                    raise refuse("sampling.schedule", f"round {i} names client {name!r}; {hint}")
                if not known[name]:
                    raise refuse(
                        "sampling.schedule",
                        f"round {i} names client {name!r}, a newcomer, who never takes part "
                        "(evaluation.newcomers)",
                    )

    def _settle_metric(self, field: str, shared: set[str]) -> None:
        """Fill in a metric that was not named; refuse one that some group does not report."""
        part = getattr(self, field)
        if part is None:
            return
        if "metric" not in part.model_fields_set and "accuracy" not in shared:
            changes = {"metric": "loss", "mode": "min"}
            object.__setattr__(self, field, part.model_copy(update=changes))
        elif part.metric not in shared:
            raise refuse(
                f"{field}.metric",
                f"{part.metric!r} is not what every group's task reports; "
                + near_match(part.metric, sorted(shared)),
            )

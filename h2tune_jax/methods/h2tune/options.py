"""The options of H2Tune, what excludes what, and the presets."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from h2tune_jax.adapters import triple
from h2tune_jax.check import (
    check_choice,
    check_not_negative,
    check_positive,
    check_whole,
    near_match,
)
from h2tune_jax.training import Schedule, cosine_schedule
from h2tune_jax.types import Array, CohortSpec, FederationError

CHOICES = {
    "core": ("residual", "pure", "parallel"),
    "selection": triple.STRATEGIES,
    "select_at": ("download", "step"),
    "basis": ("random", "seeded", "anchored", "singular"),
    "g_init": ("zero", "uniform"),
    "relation": ("depth", "places", "cka", "random"),
    "sharing": ("mean", "similar", "none"),
    "similarity": ("matrices", "data"),
    "upload": ("gradient", "transpose"),
    "alternation": ("gauss_seidel", "jacobi", "joint"),
    "average": ("selected", "all"),
    "distil_average": ("positions", "batch"),
    "optimizer_state": ("restart", "kept"),
}


class H2TuneHyper(NamedTuple):
    """Traced settings, all scalars: runs can be mapped over them."""

    learning_rate: Array  # of A, B
    shared_rate: Array  # of G, P, S
    head_rate: Array
    weight_decay: Array  # of A, B and the head; the shared part has none
    lambda_norm: Array
    lambda_keep: Array
    lambda_distil: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2TuneOptions:
    """What H2Tune can be told.

    Attributes:
      shared_rank: R; None means the largest rank of the federation.
      num_slots: L; None means the depth of the deepest model.
      core: "residual" (dW = A (I + T) B), "pure" (dW = A T B), or "parallel" (dW = A B + U T V with
        U and V frozen, from the basis: `adapters/parallel.py`).
      core_rank: rows and columns that a client's parallel core takes; None means the client's rank.
      selection: a strategy of `triple.select`.
      select_at: "download" (once a round) or "step" (afresh at every step).
      basis: "random" factors a client; "seeded": taken from one basis for all of equal width;
        "anchored": taken from bases that are fitted across models on a public probe; "singular": the
        leading singular vectors of each frozen weight, common to models cut from one.
      train_factors: False freezes A and B where they start.
      g_init: "zero", or "uniform" within +-1/(R sqrt 7).
      relation: "depth"; "places", which is depth in the whole model that a model was cut from; "cka"
        (needs `layer_outputs_fn` and a probe); or "random".
      train_relation: False keeps P where it starts.
      upload: "gradient" (train a copy of G through M = mix(P, G)) or "transpose" (train M with P
        fixed, and send unmix(P, M)).
      alternation: "gauss_seidel" (the second half sees the first's step), "jacobi" (both at the same
        point) or "joint" (never alternate: every round is a warm start).
      warmup_rounds: so many first rounds of the federation train everything jointly.
      sharing: what a client is sent: the "mean" of all; a mean for itself, of those who are "similar";
        or "none", its own again: the ablation.
      similarity: of "similar": client j weighs exp(cos_ij / temperature), by the cosine of its "matrices"
        G; or exp(-max(d_ij - 1, 0) / temperature), by the distance of its "data" (`likeness.py`; needs
        `layer_outputs_fn` and a probe).
      temperature: of "similar".
      signature_examples: how many of its examples a client describes when it goes by its data.
      average: "selected" (each entry over the clients that selected it) or "all"; None means
        "selected" for `block` and `leading`, else "all".
      lambda_norm, lambda_keep, lambda_distil: weights of the regularisers; None leaves the term out
        of the program. A joint step has the norm term only.
      distil_average: over the "positions" that the loss counts, or "batch": summed over them and
        divided by the number of examples.
      learning_rate: of A and B.
      shared_rate, head_rate: of (G, P, S) and of the task head; None means `learning_rate`.
      weight_decay: decoupled, on A, B and the head.
      optimizer: a transformation without a learning rate; None means `optax.scale_by_adam()`.
      optimizer_state: "restart" every round, or "kept".
      schedule: (step, num_steps) -> multiplier of all rates within a round.
    """

    shared_rank: int | None = None
    num_slots: int | None = None
    core: str = "residual"
    core_rank: int | None = None
    selection: str = "block"
    select_at: str = "download"
    basis: str = "random"
    train_factors: bool = True
    g_init: str = "zero"
    relation: str = "depth"
    train_relation: bool = True
    upload: str = "gradient"
    alternation: str = "gauss_seidel"
    warmup_rounds: int = 1
    sharing: str = "mean"
    similarity: str = "matrices"
    temperature: float = 0.5
    signature_examples: int = 16
    average: str | None = None
    lambda_norm: float | None = 1.0
    lambda_keep: float | None = 1.0
    lambda_distil: float | None = 1.0
    distil_average: str = "positions"
    learning_rate: float = 1e-3
    shared_rate: float | None = None
    head_rate: float | None = None
    weight_decay: float = 0.0
    optimizer: optax.GradientTransformation | None = None
    optimizer_state: str = "restart"
    schedule: Schedule | None = None

    def __post_init__(self):
        fill = lambda field, value: object.__setattr__(self, field, value)
        check_choice("selection", self.selection, triple.STRATEGIES)
        if self.average is None:
            fill("average", "all" if self.entrywise else "selected")
        for field, allowed in CHOICES.items():
            check_choice(field, getattr(self, field), allowed)
        for field in ("shared_rank", "core_rank", "num_slots", "signature_examples"):
            check_whole(field, getattr(self, field))
        for field in ("learning_rate", "shared_rate", "head_rate", "temperature"):
            check_positive(field, getattr(self, field))
        for field in (
            "weight_decay",
            "lambda_norm",
            "lambda_keep",
            "lambda_distil",
            "warmup_rounds",
        ):
            check_not_negative(field, getattr(self, field))
        if self.shared_rate is None:
            fill("shared_rate", self.learning_rate)
        if self.head_rate is None:
            fill("head_rate", self.learning_rate)
        if self.optimizer is None:
            fill("optimizer", optax.scale_by_adam())
        self._refuse_exclusions()

    def _refuse_exclusions(self) -> None:
        if self.basis != "random" and self.entrywise:
            raise FederationError(
                f"basis {self.basis!r} excludes selection {self.selection!r}: single entries carry no "
                "common coordinates; use selection 'block' or 'leading'"
            )
        if self.follows_basis and self.select_at == "step":
            raise FederationError(
                f"basis {self.basis!r} with selection 'block' excludes select_at 'step': A and B stand for "
                "the coordinates of one selection; use select_at 'download' or selection 'leading'"
            )
        if self.follows_basis and self.optimizer_state == "kept":
            raise FederationError(
                f"basis {self.basis!r} with selection 'block' excludes optimizer_state 'kept': kept "
                "moments do not follow the coordinates; use optimizer_state 'restart' or "
                "selection 'leading'"
            )
        if self.parallel and self.basis == "random":
            raise FederationError(
                "core 'parallel' excludes basis 'random': its core stands in a basis that clients share; "
                "use basis 'singular', 'seeded' or 'anchored'"
            )
        if self.core_rank is not None and not self.parallel:
            raise FederationError(
                f"core_rank excludes core {self.core!r}: there the core has the rank of A and B; use core "
                "'parallel'"
            )
        if self.sharing != "mean" and not self.trains_copy:
            raise FederationError(
                f"sharing {self.sharing!r} excludes upload 'transpose': it compares and keeps clients' "
                "copies of the shared matrices; use upload 'gradient'"
            )

    @property
    def transform(self) -> optax.GradientTransformation:
        """The optimiser of both halves."""
        assert self.optimizer is not None  # set in __post_init__
        return self.optimizer

    @property
    def entrywise(self) -> bool:
        """Single entries are selected, so rows and columns of T have no common meaning."""
        return self.selection in triple.ENTRYWISE

    @property
    def residual(self) -> bool:
        """The core stands beside the identity."""
        return self.core == "residual"

    @property
    def parallel(self) -> bool:
        """The core stands beside A and B, between frozen factors."""
        return self.core == "parallel"

    @property
    def by_data(self) -> bool:
        """Clients describe their data, so that the server knows who is alike."""
        return self.sharing == "similar" and self.similarity == "data"

    @property
    def has_scores(self) -> bool:
        """Clients hold selection scores."""
        return self.selection in ("block", "score", "score_frozen")

    @property
    def trains_scores(self) -> bool:
        """Clients train their selection scores."""
        return self.selection in ("block", "score")

    @property
    def trains_copy(self) -> bool:
        """Clients train a copy of G (and P), not their own M."""
        return self.upload == "gradient"

    @property
    def follows_basis(self) -> bool:
        """A and B stand for coordinates of a basis, and the selection may move."""
        return self.basis != "random" and self.selection == "block" and not self.parallel

    def side(self, spec: CohortSpec) -> int:
        """Rows and columns of a client's core."""
        return self.core_rank or spec.rank

    def hyper(self) -> H2TuneHyper:
        """Return the traced settings' defaults as arrays."""
        values = {name: getattr(self, name) for name in H2TuneHyper._fields}
        dtype = jnp.result_type(float)
        return H2TuneHyper(
            **{name: jnp.asarray(value or 0.0, dtype) for name, value in values.items()}
        )


def make_options(start: H2TuneOptions | None, changes: dict[str, Any]) -> H2TuneOptions:
    """Apply changes to a preset, refusing options that do not exist."""
    known = [field.name for field in dataclasses.fields(H2TuneOptions)]
    for name in changes:
        if name not in known:
            raise FederationError(f"h2tune: unknown option {name!r}; {near_match(name, known)}")
    if start is None:
        return H2TuneOptions(**changes)
    # What the preset derived is derived anew when what it came from changes.
    derived = {}
    if "selection" in changes:
        derived["average"] = None
    if "learning_rate" in changes:
        derived |= {
            name: None
            for name in ("shared_rate", "head_rate")
            if getattr(start, name) == start.learning_rate
        }
    return dataclasses.replace(start, **{**derived, **changes})


PAPER = H2TuneOptions(shared_rank=128, selection="score", relation="random", g_init="uniform")
"""The paper's form: entries selected by trained scores, a random relation, alternating halves."""

REFERENCE = H2TuneOptions(
    shared_rank=128,
    core="residual",
    selection="score_frozen",
    select_at="step",
    basis="random",
    g_init="uniform",
    relation="random",
    upload="transpose",
    alternation="jacobi",
    warmup_rounds=1,
    average="all",
    lambda_norm=1.0,
    lambda_keep=1.0,
    lambda_distil=1.0,
    distil_average="batch",
    learning_rate=2e-4,
    weight_decay=0.1,
    optimizer=optax.scale_by_adam(b2=0.95),
    optimizer_state="restart",
    schedule=cosine_schedule(warmup=0.01),
)
"""What the authors' public code states (it does not run what it states; see `docs/h2tune.md`)."""

COMMON = H2TuneOptions(
    shared_rank=64,
    core="parallel",
    core_rank=64,
    basis="singular",
    selection="leading",
    relation="places",
    train_relation=False,
    sharing="similar",
    similarity="data",
    alternation="joint",
    lambda_norm=None,
    lambda_keep=None,
    lambda_distil=None,
    learning_rate=1e-3,
    shared_rate=1e-2,
    head_rate=1e-2,
)
"""A form in which sharing carries knowledge between tasks and depths; see `docs/h2tune.md`."""

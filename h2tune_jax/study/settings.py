"""What the convergence studies run: named settings, and how methods and problems are built from them.

The theorem's setting is the default of H2Tune here: SGD with step c / sqrt T on all parts, one fixed
selection with scores that are never trained (`score_frozen`), no warm start, the norm term and the
two moving-target terms (keep, distil) left out, gradient upload, alternating halves, the layer relation
trained on its initial support.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.h2tune import H2TuneOptions
from h2tune_jax.methods.noise import noisy
from h2tune_jax.study import problems
from h2tune_jax.study.horizon import HyperFn, StepRule, set_rates
from h2tune_jax.study.norms import TrainedFn, everything, h2tune_trained
from h2tune_jax.study.problem import Problem
from h2tune_jax.types import FederationError, near_match

THEOREM: Mapping[str, Any] = {
    "selection": "score_frozen",
    "warmup_rounds": 0,
    "lambda_norm": "none",
    "lambda_keep": "none",
    "lambda_distil": "none",
    "upload": "gradient",
    "alternation": "gauss_seidel",
    "relation": "depth",
}
"""Options of `h2tune` in which the O(1/sqrt T) analysis of partial personalisation is stated."""

PROBLEMS: Mapping[str, Callable[..., Problem]] = {
    name: getattr(problems, name) for name in ("quadratic", "partial", "sensing", "transformer")
}
HORIZONS = tuple(2**power for power in range(4, 13))  # 16 ... 4096
SHORT = HORIZONS[:7]  # 16 ... 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One study: a method on a problem, over horizons, step constants and seeds.

    Attributes:
      name: of its files; what stands before the "/" is its group.
      problem, problem_options: a name of `PROBLEMS`, and its arguments.
      method, options: a method's name and options, beside SGD (and `THEOREM` for h2tune).
      step, offset: the step rule (`horizon.StepRule`).
      constants: c, each of which has to be consistent with the claim.
      horizons, seeds: T, and how many seeds.
      participation: share of each cohort in a round.
      noise: (clip, multiplier, "fixed" or "steps") of noisy uploads; "steps" counts the clip in steps,
        so that it shrinks with the step size.
      measure: "mean" (of |grad_G F|^2 + mean |grad_v f_i|^2 over the rounds) or "gap" (F - min F at
        the end).
      exponent: p of the claimed O(T^-p); None where nothing is claimed.
      about: one line for tables.
    """

    name: str
    problem: str
    problem_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    method: str = "h2tune"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    step: str = "sqrt"
    offset: float = 1.0
    constants: tuple[float, ...] = (0.3, 1.0)
    horizons: tuple[int, ...] = HORIZONS
    seeds: int = 32
    participation: float = 1.0
    noise: tuple[float, float, str] | None = None
    measure: str = "mean"
    exponent: float | None = 0.5
    about: str = ""

    @property
    def group(self) -> str:
        """What settings are shown together."""
        return self.name.partition("/")[0]

    def identity(self) -> dict[str, Any]:
        """Return all that decides what a row holds: not the horizons, not the words about it."""
        kept = dataclasses.asdict(self)
        for field in ("horizons", "about", "exponent"):
            del kept[field]
        return kept | {"options": self.method_options()}

    def method_options(self) -> dict[str, Any]:
        """Return the method's options: for h2tune those of the theorem, unless the setting differs."""
        theorem = THEOREM if self.method == "h2tune" else {}
        return {**theorem, **self.options}


def build_problem(setting: Setting) -> Problem:
    """Build a setting's problem."""
    if setting.problem not in PROBLEMS:
        raise FederationError(
            f"problem {setting.problem!r} is unknown; {near_match(setting.problem, PROBLEMS)}"
        )
    try:
        return PROBLEMS[setting.problem](**setting.problem_options)
    except TypeError as error:
        raise FederationError(f"problem {setting.problem!r}: {error}") from None


def build_method(setting: Setting) -> tuple[FederatedMethod, TrainedFn, HyperFn]:
    """Build a setting's method, what it trains, and how the step size enters its settings."""
    from h2tune_jax.run import catalog  # reads configs, which the rest of a study does not need
    from h2tune_jax.run.settings import MethodConfig

    known = catalog.method_options(setting.method)
    options: dict[str, Any] = {"optimizer": "sgd"} if "optimizer" in known else {}
    trained: TrainedFn = everything
    options |= setting.method_options()
    if setting.method == "h2tune":
        start = catalog.PRESETS["h2tune"].get(options.get("preset") or "", H2TuneOptions())
        held = ("upload", "train_factors", "train_relation")
        trained = h2tune_trained(**{name: options.get(name, getattr(start, name)) for name in held})
    method = catalog.build_method(MethodConfig(name=setting.method, **options))
    if setting.noise is None:
        return method, trained, set_rates
    clip, multiplier, unit = setting.noise
    if unit not in ("fixed", "steps"):
        raise FederationError(f"noise: {unit!r} is unknown; {near_match(unit, ('fixed', 'steps'))}")

    def clip_by_step(hyper, rate):
        return set_rates(hyper, rate)._replace(clip=clip * rate)

    method = noisy(method, clip=clip, multiplier=multiplier)
    return method, trained, clip_by_step if unit == "steps" else set_rates


def step_rule(setting: Setting) -> StepRule:
    """Return a setting's step rule."""
    return StepRule(kind=setting.step, offset=setting.offset)


FROZEN = {"core": "pure", "shared_rank": 4, "train_factors": False}
TRIPLE = {"core": "pure", "shared_rank": 4}


def _main() -> list[Setting]:
    return [
        Setting(
            name="h2tune/partial",
            problem="partial",
            options=FROZEN,
            constants=(0.1, 0.3, 1.0),
            about="quadratic with shared and personal parts, A and B frozen",
        ),
        Setting(
            name="h2tune/sensing",
            problem="sensing",
            options=TRIPLE,
            about="matrix sensing by triple factors, non-convex",
        ),
        Setting(
            name="h2tune/transformer",
            problem="transformer",
            options=FROZEN,
            constants=(0.3, 1.0, 3.0),
            horizons=HORIZONS[:6],
            seeds=8,
            about="two-layer transformer on TREC, A and B frozen; cut to T <= 512, 8 seeds",
        ),
        Setting(
            name="beyond/transformer-factors",
            problem="transformer",
            options=TRIPLE,
            horizons=HORIZONS[:6],
            seeds=8,
            about="the same transformer, A and B trained; cut to T <= 512, 8 seeds",
        ),
    ]


def _fedavg() -> list[Setting]:
    start: dict[str, Any] = {"problem": "quadratic", "method": "fedavg"}
    return [
        Setting(**start, name="fedavg/sqrt", constants=(1.0, 3.0), about="step c / sqrt T"),
        Setting(
            **start,
            name="fedavg/decreasing",
            # Many coordinates and seeds: the gap of one last iterate scatters widely.
            problem_options={"dim": 64},
            seeds=128,
            step="decreasing",
            offset=8.0,
            constants=(2.0,),
            measure="gap",
            exponent=1.0,
            about="step c / (t + 8): F - min F falls as 1/T",
        ),
        Setting(
            **start,
            name="fedavg/constant",
            step="constant",
            constants=(0.05, 0.1, 0.2, 0.4),
            horizons=HORIZONS[:7],
            measure="gap",
            exponent=None,
            about="constant step: a floor of noise and drift",
        ),
        Setting(
            **start,
            name="fedavg/noiseless",
            problem_options={"sigma": 0.0, "spread": 0.0},
            step="constant",
            constants=(0.05, 0.1, 0.2, 0.4),
            horizons=HORIZONS[:4],
            seeds=4,
            measure="gap",
            exponent=None,
            about="constant step, no noise, equal curvatures: linear convergence",
        ),
        Setting(
            **start,
            name="fedavg/drift",
            problem_options={"sigma": 0.0},
            step="constant",
            constants=(0.05, 0.1, 0.2, 0.4),
            horizons=HORIZONS[:6],
            seeds=4,
            measure="gap",
            exponent=None,
            about="constant step, no noise, unequal curvatures: the floor of drift",
        ),
    ]


def _wrong() -> list[Setting]:
    partial: dict[str, Any] = {"problem": "partial", "options": FROZEN, "seeds": 8}
    whole: dict[str, Any] = {"problem": "quadratic", "method": "fedavg", "seeds": 8}
    return [
        Setting(
            **{**start, **change},
            name=f"wrong/{name}-{method}",
            about=f"{method}, {about}",
        )
        for method, start in (("h2tune", partial), ("fedavg", whole))
        for name, about, change in (
            ("constant", "step c, not c / sqrt T", {"step": "constant", "constants": (0.2,)}),
            ("inverse", "step c / T", {"step": "inverse", "constants": (1.0,)}),
            ("large", "c far too large", {"constants": (300.0,)}),
        )
    ]


def _sweeps() -> list[Setting]:
    start: dict[str, Any] = {
        "problem": "sensing",
        "options": TRIPLE,
        "constants": (0.3,),
        "horizons": SHORT,
        "seeds": 8,
    }
    many = {"num_clients": 20, "measurements": 32}
    found = [
        Setting(
            **start,
            name=f"participation/{round(100 * share)}",
            problem_options=many,
            participation=share,
            about=f"{round(100 * share)} % of 20 clients a round",
        )
        for share in (0.1, 0.25, 0.5, 1.0)
    ]
    found += [
        Setting(
            **start,
            name=f"local_steps/{steps}",
            problem_options={"local_steps": steps},
            about=f"{steps} local steps a round",
        )
        for steps in (1, 2, 4, 8, 16, 32)
    ]
    found += [
        Setting(
            **start,
            name=f"heterogeneity/{zeta:g}",
            problem_options={"heterogeneity": zeta},
            about=f"zeta = {zeta:g}",
        )
        for zeta in (0.0, 0.3, 1.0, 3.0)
    ]
    found += [
        Setting(
            **{**start, "options": {**TRIPLE, "alternation": form}},
            name=f"alternation/{form}",
            about=form,
        )
        for form in ("gauss_seidel", "jacobi", "joint")
    ]
    uploads = {
        "gradient": {"upload": "gradient"},
        "transpose": {"upload": "transpose"},
        "gradient-random": {"upload": "gradient", "relation": "random"},
        "transpose-random": {"upload": "transpose", "relation": "random"},
    }
    found += [
        Setting(
            **{**start, "options": {**TRIPLE, **options}},
            name=f"upload/{name}",
            about=f"upload {options['upload']}, relation {options.get('relation', 'depth')}",
        )
        for name, options in uploads.items()
    ]
    noises = {
        "none": None,
        "clipped": (1.0, 0.0, "steps"),
        "steps": (1.0, 1.0, "steps"),
        "fixed": (0.02, 1.0, "fixed"),
    }
    words = {
        "none": "no clipping, no noise",
        "clipped": "updates clipped at one step's length, no noise",
        "steps": "the same, and noise of that size",
        "fixed": "clip and noise of a fixed size",
    }
    found += [
        Setting(**start, name=f"noise/{name}", noise=noise, about=words[name])
        for name, noise in noises.items()
    ]
    return found


SETTINGS: Mapping[str, Setting] = {
    setting.name: setting for setting in (*_main(), *_fedavg(), *_wrong(), *_sweeps())
}
"""All named settings."""

SMOKE = Setting(
    name="smoke/fedavg",
    problem="quadratic",
    method="fedavg",
    constants=(1.0, 3.0),
    horizons=(16, 32, 64, 128),
    seeds=8,
    about="FedAvg on the quadratic, in seconds",
)

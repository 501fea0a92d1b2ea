"""From names in a config to methods, optimisers and schedules.

A method is known by the name of its file in `h2tune_jax.methods`, which has a factory of that name; its
options are the factory's own parameters, and are checked against their annotations.
"""

import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

import h2tune_jax.methods
from h2tune_jax.method import FederatedMethod
from h2tune_jax.methods.h2tune import COMMON, PAPER, REFERENCE, H2TuneOptions
from h2tune_jax.methods.proximal import proximal
from h2tune_jax.methods.server_optimizer import server_optimizer
from h2tune_jax.run.settings import MethodConfig, RunConfig, ScheduleConfig
from h2tune_jax.training import Schedule, cosine_schedule
from h2tune_jax.types import FederationError, near_match

PRESETS = {"h2tune": {"common": COMMON, "paper": PAPER, "reference": REFERENCE}}
"""Named sets of options, chosen by the option `preset`."""

OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "lion": optax.scale_by_lion,
    "sgd": lambda *, momentum=0.0, nesterov=False: (
        optax.trace(decay=momentum, nesterov=nesterov) if momentum else optax.identity()
    ),
}
"""Transformations without a learning rate of their own; weight decay is an option of the methods."""

SERVER_OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adagrad": lambda *, learning_rate=1e-1: optax.adagrad(learning_rate),
    "adam": lambda *, learning_rate=1e-2, b1=0.9, b2=0.99, eps=1e-3: optax.adam(
        learning_rate, b1=b1, b2=b2, eps=eps
    ),
    "sgd": lambda *, learning_rate=1.0, momentum=0.0: optax.sgd(
        learning_rate, momentum=momentum or None
    ),
    "yogi": lambda *, learning_rate=1e-2, b1=0.9, b2=0.99, eps=1e-3: optax.yogi(
        learning_rate, b1=b1, b2=b2, eps=eps
    ),
}
"""Optimisers of what a server averages (Reddi et al. 2021), with a learning rate of their own."""

SCHEDULES: Mapping[str, Callable[..., Schedule]] = {"cosine": cosine_schedule}
"""Schedules over the steps within a round."""


_Range = tuple[Callable[[float], bool], str]
_SHARE: _Range = lambda x: 0 <= x < 1, "at least 0 and below 1"
_POSITIVE: _Range = lambda x: 0 < x < math.inf, "above 0"

_RANGES: Mapping[str, _Range] = {
    "b1": _SHARE,
    "b2": _SHARE,
    "momentum": _SHARE,
    "eps": _POSITIVE,
    "eps_root": (lambda x: 0 <= x < math.inf, "at least 0"),
    "learning_rate": _POSITIVE,
    "smooth_beta": _POSITIVE,
    "warmup": (lambda x: 0 <= x <= 1, "from 0 to 1"),
}
"""What the numbers in these tables may be. A mean that keeps a share of 1 learns nothing."""


class OptionError(FederationError):
    """A method's option that cannot be had; `option` is its key in the config's table `method`."""

    def __init__(self, option: str, reason: str):
        self.option, self.reason = option, reason
        super().__init__(f"method.{option}: {reason}")


class Option(NamedTuple):
    """One option of a method."""

    annotation: Any
    default: Any


@functools.cache
def method_names() -> tuple[str, ...]:
    """Return the names of all methods, in alphabetical order."""
    found = (module.name for module in pkgutil.iter_modules(h2tune_jax.methods.__path__))
    return tuple(sorted(name for name in found if _find_factory(name) is not None))


def _find_factory(name: str) -> Callable[..., FederatedMethod] | None:
    if not name.isidentifier():
        return None
    try:
        module = importlib.import_module(f"h2tune_jax.methods.{name}")
    except ModuleNotFoundError:
        return None
    factory = getattr(module, name, None)
    if not inspect.isfunction(factory):
        return None
    # Wrappers of methods are no methods: they need one.
    needed = [
        p
        for p in inspect.signature(factory).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    returns = typing.get_type_hints(factory).get("return")
    return factory if returns is FederatedMethod and not needed else None


def find_method(name: str) -> Callable[..., FederatedMethod]:
    """Return a method's factory."""
    factory = _find_factory(name)
    if factory is None:
        raise OptionError(
            "name", f"no method is called {name!r}; {near_match(name, method_names())}"
        )
    return factory


def method_options(name: str) -> dict[str, Option]:
    """Return the options of a method by name, with annotation and default."""
    factory = find_method(name)
    hints = typing.get_type_hints(factory)
    found: dict[str, Option] = {}
    if name == "h2tune":
        hints = typing.get_type_hints(H2TuneOptions)
        for field in dataclasses.fields(H2TuneOptions):
            found[field.name] = Option(hints[field.name], field.default)
    else:
        for parameter in inspect.signature(factory).parameters.values():
            if parameter.kind == parameter.KEYWORD_ONLY:
                found[parameter.name] = Option(hints.get(parameter.name, Any), parameter.default)
    if name in PRESETS:
        found["preset"] = Option(str | None, None)
    # Wrappers, for every method that shares something.
    found["proximal"] = Option(float | None, None)
    found["server_optimizer"] = Option(optax.GradientTransformation | None, None)
    return found


def build_method(config: RunConfig | MethodConfig) -> FederatedMethod:
    """Build a config's method. Raises `OptionError` for options that it does not have or not so."""
    method = config.method if isinstance(config, RunConfig) else config
    factory = find_method(method.name)
    known = method_options(method.name)
    options: dict[str, Any] = {}
    for name, value in method.options.items():
        if name not in known:
            raise OptionError(
                name, f"unknown option of {method.name!r}; {near_match(name, sorted(known))}"
            )
        table = SERVER_OPTIMIZERS if name == "server_optimizer" else OPTIMIZERS
        options[name] = _convert(name, value, known[name].annotation, table)
    mu, server = options.pop("proximal", None), options.pop("server_optimizer", None)
    built = _call(factory, method.name, options)
    if mu is not None:
        built = _wrap("proximal", proximal, built, mu)
    if server is not None:
        built = _wrap("server_optimizer", server_optimizer, built, server)
    return built


def _call(factory: Callable[..., Any], name: str, options: dict[str, Any]) -> FederatedMethod:
    positional = ()
    if options.get("preset") is not None:
        presets = PRESETS[name]
        chosen = options.pop("preset")
        if chosen not in presets:
            raise OptionError("preset", f"{chosen!r} is unknown; {near_match(chosen, presets)}")
        positional = (presets[chosen],)
    try:
        return factory(*positional, **options)
    except FederationError as error:
        reason = str(error)
        named = [option for option in options if option in reason]
        raise OptionError(named[0] if named else "name", reason) from None


def _wrap(
    option: str, wrapper: Callable[..., FederatedMethod], method: FederatedMethod, value: Any
) -> FederatedMethod:
    try:
        return wrapper(method, value)
    except FederationError as error:
        raise OptionError(option, str(error)) from None


def method_config(config: MethodConfig, name: str) -> MethodConfig:
    """Return the config of another method, with those of the options that it has too."""
    known = method_options(name)
    kept = {key: value for key, value in config.options.items() if key in known}
    shared = build_method(MethodConfig(name=name)).shared
    if shared is None:
        kept.pop("proximal", None)
    if not shared:
        kept.pop("server_optimizer", None)
    return MethodConfig(name=name, rank=config.rank, **kept)


def _convert(
    name: str, value: Any, annotation: Any, optimizers: Mapping[str, Any] = OPTIMIZERS
) -> Any:
    """Turn a TOML value into what the annotation asks for, or say what is allowed."""
    kinds = _union(annotation)
    if value == "none" and type(None) in kinds:
        return None
    if optax.GradientTransformation in kinds:
        return _make(name, value, optimizers)
    if _is_schedule(kinds):
        return _make(name, value, SCHEDULES)
    words = [word for kind in kinds for word in typing.get_args(kind) if _is_literal(kind)]
    if words and value not in words:
        raise OptionError(name, f"{value!r} is unknown; {near_match(str(value), map(str, words))}")
    plain = [kind for kind in kinds if kind in (bool, int, float, str)]
    if not plain or words:
        return value
    for kind in plain:
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    allowed = [names[kind] for kind in plain] + ["'none'"] * (type(None) in kinds)
    raise OptionError(name, f"must be {' or '.join(allowed)}, not {value!r}")


def _union(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def _is_literal(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal


def _is_schedule(kinds: tuple[Any, ...]) -> bool:
    return any(kind == Schedule for kind in kinds)


def _make(name: str, value: Any, table: Mapping[str, Callable[..., Any]]) -> Any:
    """Build what a name, or a table {name = ..., further options}, stands for."""
    options = dict(value) if isinstance(value, Mapping) else {"name": value}
    chosen = options.pop("name", None)
    if chosen not in table:
        raise OptionError(name, f"{chosen!r} is unknown; {near_match(str(chosen), table)}")
    build = table[chosen]
    known = {
        p.name: p.default
        for p in inspect.signature(build).parameters.values()
        if isinstance(p.default, bool | int | float)
    }
    for option, given in options.items():
        if option not in known:
            raise OptionError(
                name, f"{chosen!r} has no option {option!r}; {near_match(option, known)}"
            )
        is_flag = isinstance(known[option], bool)
        if isinstance(given, bool) != is_flag or not isinstance(given, bool | int | float):
            wanted = "true or false" if is_flag else "a number"
            raise OptionError(name, f"{option} must be {wanted}, not {given!r}")
        fits, wanted = _RANGES.get(option, (lambda x: True, ""))
        if not is_flag and not fits(given):
            raise OptionError(name, f"{option} must be {wanted}, not {given!r}")
    return build(**options)


def rate_factor(schedule: ScheduleConfig, round_index: int, rounds: int) -> float:
    """Return what the rates of a round, counted from 0, are multiplied by."""
    if round_index < schedule.warmup:
        return (round_index + 1) / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    # The last round has the final rate; one round after the rise has the full one.
    along = (round_index - schedule.warmup) / max(rounds - 1 - schedule.warmup, 1)
    left = 1 - along if schedule.kind == "linear" else 0.5 * (1 + math.cos(math.pi * along))
    return schedule.final + (1 - schedule.final) * left


def scale_rates(hyper: Any, factor: float) -> Any:
    """Multiply every field of a method's `hyper` whose name ends in "rate"."""
    if factor == 1.0:
        return hyper
    scaled = {
        name: value * jax.numpy.asarray(factor, value.dtype)
        for name, value in hyper._asdict().items()
        if name.endswith("rate")
    }
    return hyper._replace(**scaled)

"""Names in a config become methods, optimisers and schedules, or an error that says what there is."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import h2tune_jax as h2
from h2tune_jax.run import catalog
from h2tune_jax.run.settings import MethodConfig, ScheduleConfig


def build(name, **options):
    return catalog.build_method(MethodConfig(name=name, **options))


@pytest.mark.parametrize("name", catalog.method_names())
def test_every_method_builds_by_its_name(name):
    assert build(name).name == name
    assert "learning_rate" in catalog.method_options(name)


def test_known_methods_are_found():
    assert {"h2tune", "local", "fedavg"} <= set(catalog.method_names())
    # Modules beside the methods that hold what they share are none.
    assert not {"state", "lora", "__init__"} & set(catalog.method_names())


def test_options_reach_the_method():
    method = build("h2tune", learning_rate=3e-3, head_rate=1, lambda_norm=0.25)
    assert float(method.hyper.learning_rate) == np.float32(3e-3)
    assert float(method.hyper.head_rate) == 1.0  # a whole number will do for a number
    assert float(method.hyper.lambda_norm) == 0.25
    assert build("h2tune", lambda_norm="none").name == "h2tune"


def test_presets():
    method = build("h2tune", preset="reference", learning_rate=1e-3)
    assert float(method.hyper.weight_decay) == np.float32(0.1)
    assert float(method.hyper.learning_rate) == np.float32(1e-3)


def test_optimizers_by_name():
    parts = catalog._make("optimizer", {"name": "sgd", "momentum": 0.5}, catalog.OPTIMIZERS)
    state = parts.init(jnp.zeros(1))
    for expected in (2.0, 3.0, 3.5):  # 2, 2 + 2/2, 2 + 3/2
        update, state = parts.update(jnp.full(1, 2.0), state)
        assert float(update[0]) == expected
    plain = catalog._make("optimizer", "sgd", catalog.OPTIMIZERS)
    assert float(plain.update(jnp.full(1, 2.0), plain.init(jnp.zeros(1)))[0][0]) == 2.0
    assert build("local", optimizer={"name": "adam", "b2": 0.95}).name == "local"


def test_wrappers_are_options_of_every_method_that_shares():
    assert build("h2tune", proximal=0.1).name == "h2tune+proximal"
    assert float(build("fedit", proximal=0.1).hyper.proximal_mu) == np.float32(0.1)
    both = build("fedit", proximal=1, server_optimizer={"name": "adam", "learning_rate": 0.1})
    assert both.name.startswith("fedit+proximal+")
    assert build("fedit", proximal="none").name == "fedit"


@pytest.mark.parametrize("name", catalog.SERVER_OPTIMIZERS)
def test_server_optimizers_build_and_move(name):
    parts = catalog._make("server_optimizer", name, catalog.SERVER_OPTIMIZERS)
    start = jnp.zeros(2)
    with jax.numpy_dtype_promotion("standard"):  # which optax is written for
        update, _ = parts.update(jnp.ones(2), parts.init(start), start)
    assert bool((update < 0).all())  # against the gradient: their rate is their own


def test_schedules_by_name():
    half = catalog._make("schedule", {"name": "cosine", "warmup": 0.5}, catalog.SCHEDULES)
    steps = jnp.arange(4)
    values = [float(half(step, jnp.asarray(4))) for step in steps]
    np.testing.assert_allclose(values, [0, 0.5, 1, 0.5], atol=1e-6)
    assert build("h2tune", schedule="cosine").name == "h2tune"


@pytest.mark.parametrize(
    ("name", "options", "option", "words"),
    [
        ("lcoal", {}, "name", "no method is called 'lcoal'; .* did you mean 'local'"),
        ("../local", {}, "name", "no method is called"),
        ("h2tune.state", {}, "name", "no method is called"),
        ("local", {"lambda_norm": 1.0}, "lambda_norm", "unknown option of 'local'; allowed: head_rate"),
        ("local", {"learning_rate": "x"}, "learning_rate", "must be a number, not 'x'"),
        ("local", {"learning_rate": True}, "learning_rate", "must be a number, not True"),
        ("local", {"learning_rate": "none"}, "learning_rate", "must be a number, not 'none'"),
        ("local", {"head_rate": "x"}, "head_rate", "a number or 'none'"),
        ("local", {"learning_rate": -1.0}, "learning_rate", "learning_rate"),
        ("local", {"optimizer_state": "keep"}, "optimizer_state", "did you mean 'kept'"),
        ("local", {"optimizer": "adamm"}, "optimizer", "did you mean 'adam'"),
        ("local", {"optimizer": {"name": "adam", "b3": 0.1}}, "optimizer", "no option 'b3'"),
        ("local", {"optimizer": {"name": "adam", "b2": "x"}}, "optimizer", "must be a number"),
        ("local", {"optimizer": {"name": "sgd", "nesterov": 1}}, "optimizer", "true or false"),
        ("local", {"optimizer": {}}, "optimizer", "None is unknown; allowed: adam"),
        (
            "local", {"optimizer": {"name": "adam", "b2": 2.0}}, "optimizer",
            "b2 must be at least 0 and below 1, not 2.0",
        ),
        (
            "fedit", {"server_optimizer": {"name": "adam", "b1": 1.5}}, "server_optimizer",
            "b1 must be at least 0 and below 1, not 1.5",
        ),
        (
            "fedit", {"server_optimizer": {"name": "sgd", "learning_rate": 0}}, "server_optimizer",
            "learning_rate must be above 0, not 0",
        ),
        ("local", {"schedule": {"name": "cosine", "warmup": 5}}, "schedule", "from 0 to 1, not 5"),
        ("local", {"schedule": "linear"}, "schedule", "'linear' is unknown; allowed: cosine"),
        ("h2tune", {"warmup_rounds": 1.5}, "warmup_rounds", "must be a whole number, not 1.5"),
        ("h2tune", {"train_factors": 1}, "train_factors", "must be true or false, not 1"),
        ("local", {"proximal": 0.1}, "proximal", "share nothing"),
        ("fedit", {"proximal": -1.0}, "proximal", "mu"),
        ("fedit", {"server_optimizer": "adm"}, "server_optimizer", "did you mean 'adam'"),
        ("h2tune", {"preset": "papers"}, "preset", "did you mean 'paper'"),
        ("h2tune", {"basis": "seeded", "selection": "score"}, "basis", "excludes selection"),
    ],
)  # fmt: skip
def test_refused(name, options, option, words):
    with pytest.raises(catalog.OptionError, match=words) as error:
        build(name, **options)
    assert error.value.option == option
    assert isinstance(error.value, h2.FederationError)


@pytest.mark.parametrize(
    "table", [catalog.OPTIMIZERS, catalog.SERVER_OPTIMIZERS, catalog.SCHEDULES]
)
def test_every_number_of_an_optimizer_has_a_range(table):
    """Also one that a newer optax adds."""
    for name, build in table.items():
        for option in inspect.signature(build).parameters.values():
            if isinstance(option.default, bool) or not isinstance(option.default, int | float):
                continue
            catalog._make("option", {"name": name, option.name: option.default}, table)
            for wrong in (-0.1, math.nan, math.inf):
                with pytest.raises(catalog.OptionError, match=f"{option.name} must be .*, not "):
                    catalog._make("option", {"name": name, option.name: wrong}, table)


def test_another_method_keeps_the_options_that_it_has():
    config = MethodConfig(name="h2tune", rank=4, learning_rate=1e-2, lambda_norm=0.1)
    other = catalog.method_config(config, "local")
    assert (other.name, other.rank, other.options) == ("local", 4, {"learning_rate": 1e-2})
    wrapped = MethodConfig(name="h2tune", proximal=0.1, server_optimizer="sgd")
    assert catalog.method_config(wrapped, "local").options == {}
    assert set(catalog.method_config(wrapped, "fedit").options) == {"proximal", "server_optimizer"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "constant"}, [1, 1, 1, 1, 1]),
        ({"kind": "constant", "warmup": 2}, [0.5, 1, 1, 1, 1]),
        ({"kind": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"kind": "linear", "warmup": 2, "final": 0.2}, [0.5, 1, 1, 0.6, 0.2]),
        (
            {"kind": "cosine", "final": 0.5},
            [1, 0.75 + 0.25 * 2**-0.5, 0.75, 0.75 - 0.25 * 2**-0.5, 0.5],
        ),
    ],
)  # fmt: skip
def test_rates_over_rounds(settings, expected):
    schedule = ScheduleConfig(**settings)
    factors = [catalog.rate_factor(schedule, i, 5) for i in range(5)]
    np.testing.assert_allclose(factors, expected, rtol=1e-12)


def test_rates_of_one_round_are_whole():
    assert catalog.rate_factor(ScheduleConfig(kind="cosine"), 0, 1) == 1.0


def test_only_rates_are_scaled():
    hyper = build("h2tune", learning_rate=0.5, head_rate=0.25, lambda_norm=0.125).hyper
    scaled = catalog.scale_rates(hyper, 0.5)
    assert float(scaled.learning_rate) == 0.25
    assert float(scaled.head_rate) == 0.125
    assert float(scaled.shared_rate) == 0.25
    assert float(scaled.lambda_norm) == 0.125
    assert float(scaled.weight_decay) == 0.0
    assert scaled.learning_rate.dtype == hyper.learning_rate.dtype

import dataclasses

import pytest

import h2tune_jax as h2
from h2tune_jax.bench.cases import CLIENTS, Case, default_case, default_plan, product_plan


@pytest.mark.parametrize(("backend", "devices"), [("cpu", 2), ("gpu", 1), ("gpu", 8)])
def test_the_default_plan_varies_everything_that_was_promised(backend, devices):
    plan = default_plan(backend, devices)
    seen = lambda field, model: {getattr(c, field) for c in plan if c.model == model}
    assert seen("clients", "mlp") >= set(CLIENTS)
    assert seen("axis", "mlp") == {"vmap", "scan", "16"}
    assert seen("axis", "minilm") == {"vmap", "scan", "4"}
    assert seen("rank", "minilm") == {4, 8, 32}
    assert seen("kernels", "minilm") == {"xla", "triton"}
    for case in (case for case in plan if case.kernels == "triton"):
        assert dataclasses.replace(case, kernels="xla") in plan
    assert seen("devices", "minilm") == {1, 2, devices}
    assert {c.model for c in plan} == {"mlp", "minilm", "smollm2", "llama-3.2-1b", "llama-3.2-3b"}
    assert len(plan) == len(set(plan))


def test_a_selection_combines_its_values_and_spares_the_mlp_what_it_has_not():
    plan = product_plan("cpu", ["mlp", "tiny"], clients=[2, 3], rank=[4, 8])
    assert [(c.model, c.clients, c.rank) for c in plan] == [
        ("mlp", 2, 0),
        ("mlp", 3, 0),
        ("tiny", 2, 4),
        ("tiny", 2, 8),
        ("tiny", 3, 4),
        ("tiny", 3, 8),
    ]
    # What two values allow together need not be allowed one by one.
    (case,) = product_plan("cpu", ["tiny"], kernels=["triton"], method=["h2tune"])
    assert (case.kernels, case.method) == ("triton", "h2tune")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "minilmm"}, "did you mean 'minilm'"),
        ({"axis": "0"}, "axis '0'"),
        ({"kernels": "cuda"}, "kernels 'cuda'"),
        ({"kernels": "triton"}, "a plain LoRA has no core"),
        ({"clients": 0}, "clients must be at least 1"),
        ({"method": "fedavg"}, "fedavg is for the mlp"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"dtype": "float16"}, "dtype 'float16'"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused_by_name(change, message):
    values = dataclasses.asdict(default_case("tiny", "cpu")) | change
    with pytest.raises(h2.FederationError, match=message):
        Case(**values)

import jax
import numpy as np
import pytest

from h2tune_jax.bench import machine, measure
from h2tune_jax.bench.cases import default_case
from h2tune_jax.bench.workload import Unavailable, build, count_tokens

PEAK = machine.Spread(1e12, 0.9e12, 1.1e12)
LIMITS = measure.Limits(runs=2, compiles=1)


def test_the_figures_of_a_case_fit_each_other():
    row = measure.measure(default_case("mlp", "cpu", clients=3), LIMITS, PEAK)
    assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
    assert row["clients_per_second"] == pytest.approx(3 / row["seconds"])
    assert row["examples_per_second"] == pytest.approx(300 / row["seconds"])
    assert row["tokens_per_second"] is None
    assert row["gflops"] == pytest.approx(1e3 * row["tflop_a_round"] / row["seconds"])
    assert row["share_of_peak"] == pytest.approx(row["gflops"] / 1e3)
    data = 3 * 100 * 785 * 4
    assert data < row["planned_bytes"] < row["peak_bytes"]


def test_devices_of_the_cpu_share_its_peak(cpu_devices):
    row = measure.measure(default_case("mlp", "cpu", clients=4, devices=2), LIMITS, PEAK)
    assert row["share_of_peak"] == pytest.approx(row["gflops"] / 1e3)


def test_tokens_are_counted_from_the_masks():
    data = build(default_case("tiny", "cpu", clients=2, steps=3)).make_data()
    assert count_tokens(data) == 2 * 3 * 8 * 16
    masks = data.examples["attention_mask"].at[0, 0, 5:].set(0)
    shorter = data._replace(examples={**data.examples, "attention_mask": masks})
    assert count_tokens(shorter) == 2 * 3 * 8 * 16 - 11


@pytest.fixture
def nothing_is_allocated(monkeypatch):
    def refuse(case):
        def fail():
            raise AssertionError("something was allocated")

        return build(case)._replace(make_base=fail, make_data=fail)

    monkeypatch.setattr(measure, "build", refuse)


def test_what_does_not_fit_is_refused_before_it_is_allocated(nothing_is_allocated, monkeypatch):
    case = default_case("llama-3.2-3b", "cpu", clients=1_000_000)
    with pytest.raises(Unavailable, match=r"base, data and clients need .* GB"):
        measure.measure(case, LIMITS, PEAK)
    # All that is held fits here, but what the compiler plans beside it does not.
    case = default_case("mlp", "cpu", clients=50, axis="vmap")
    held = 50 * 100 * 785 * 4 + 50 * 8 + 4 * 110_000
    monkeypatch.setattr(machine, "free_memory", lambda: int(1.2 * held / measure.HEADROOM))
    with pytest.raises(Unavailable, match="a round's arguments and temporaries need"):
        measure.measure(case, LIMITS, PEAK)


def test_what_would_take_too_long_is_refused(nothing_is_allocated):
    case = default_case("tiny", "cpu", clients=1000)
    with pytest.raises(Unavailable, match=r"4 rounds of .* may take .* s, more than the 1 s"):
        measure.measure(case, LIMITS._replace(seconds=1.0), machine.Spread(1e9, 1e9, 1e9))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kernels": "triton", "method": "h2tune"}, "CUDA device only"),
        ({"devices": 1000}, "1000 devices are asked for"),
    ],
)
def test_what_the_machine_cannot_do_is_refused_with_a_reason(changes, reason):
    with pytest.raises(Unavailable, match=reason):
        measure.measure(default_case("tiny", "cpu", **changes), LIMITS, PEAK)


def test_weights_that_are_not_there_are_a_reason_to_skip(monkeypatch, tmp_path):
    monkeypatch.setenv("H2TUNE_ASSETS", str(tmp_path))
    for model in ("minilm", "smollm2"):
        with pytest.raises(Unavailable, match=f"`make assets` fetches {model}"):
            build(default_case(model, "cpu"))


def test_random_bases_have_norms_of_one_and_the_dtype_asked_for():
    base = build(default_case("tiny", "cpu", dtype="bfloat16")).make_base()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {"bfloat16"}
    np.testing.assert_array_equal(base["layers"]["mlp_norm"]["w"], 1)
    q, k = (np.asarray(base["layers"]["attention"][kind]["w"], np.float32) for kind in "qk")
    assert 0.01 < q.std() < 0.03
    assert abs(np.corrcoef(q.ravel(), k.ravel())[0, 1]) < 0.1

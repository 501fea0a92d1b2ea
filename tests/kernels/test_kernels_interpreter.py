"""The kernels' own code, run by Triton's interpreter, against the float64 oracle."""

import kernel_checks
import pytest
from kernel_cases import CASES, TOLERANCE, Case


def plans(case: Case) -> list[str | None]:
    """The table's choice, and every plan that the case allows."""
    if case.ranks:
        return ["around", "inplace"]
    return ["around", "fused"] if case.shared else ["around", "inplace", "fused"]


TABLE = [(case, plan) for case in CASES for plan in plans(case)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("case", "plan"), TABLE, ids=[f"{c.name}-{p}" for c, p in TABLE])
def test_forward_and_every_gradient(interpreted, case, plan, dtype):
    errors = interpreted(kernel_checks.errors, case, dtype, "triton", plan)
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("size", [0, 21])
def test_ranks_are_clipped(interpreted, size):
    """Rank 20 in a tile of 32: a rank of 32 would read into the next row, and not only zeros."""
    case = Case(3, 9, 24, 18, 20, size=size, ranks=(32, 20, -1))
    errors = interpreted(kernel_checks.errors, case, "float32", "triton", "around")
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE["float32"]} == {}


@pytest.mark.parametrize("plan", ["around", "fused"])
def test_bfloat16_code_path(interpreted, plan):
    """bf16 loads, roundings and stores; the products run upcast (see interpret.py)."""
    errors = interpreted(kernel_checks.errors, CASES[1], "bfloat16", "triton", plan)
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE["bfloat16"]} == {}


def test_table_choice(interpreted):
    for case in (CASES[0], CASES[2]):
        errors = interpreted(kernel_checks.errors, case, "float16", "triton", None)
        assert max(errors.values()) <= TOLERANCE["float16"]


@pytest.mark.parametrize("sparse", [pytest.param(False, marks=pytest.mark.slow), True])
def test_transformations(interpreted, sparse):
    errors = interpreted(kernel_checks.same_under_transforms, "triton", "around", sparse)
    assert {name: e for name, e in errors.items() if not e <= TOLERANCE["float32"]} == {}


@pytest.mark.parametrize(
    ("plan", "transform", "expected"),
    [
        ("around", "forward", {"down_kernel": 1, "up_kernel": 1}),
        ("inplace", "forward", {"down_kernel": 1, "up_kernel": 1}),
        ("fused", "forward", {"fused_kernel": 1}),
        ("around", "backward", {"down_kernel": 2, "up_kernel": 2, "outer_kernel": 3}),
        ("fused", "backward", {"fused_kernel": 2, "outer_kernel": 3}),
        # Weight gradients that nobody asks for cost nothing: x and dy are not read for dA and dB,
        # and no dx is made.
        ("around", "core alone", {"down_kernel": 2, "outer_kernel": 1}),
    ],
)
def test_one_launch_for_all_clients(interpreted, plan, transform, expected):
    case = Case(5, 6, 16, 16, 2)
    assert interpreted(kernel_checks.launches, case, plan, transform) == expected


def test_sparse_backward_adds_one_scatter(interpreted):
    case = Case(5, 6, 16, 16, 2, size=4)
    counts = interpreted(kernel_checks.launches, case, "fused", "backward")
    assert counts == {"fused_kernel": 2, "outer_kernel": 3, "scatter_kernel": 1}


def test_ragged_clients_cost_their_own_ranks(interpreted):
    case = Case(2, 20, 48, 48, 64)
    both, low, high = (
        interpreted(kernel_checks.multiply_adds, case, ranks)
        for ranks in ((4, 64), (4, 4), (64, 64))
    )
    assert 2 * both == low + high
    assert low * 3 < high


def test_unwritten_outputs_show(interpreted):
    """Outputs start as NaN: a launch short of programs leaves some, a full one none."""
    assert not interpreted(kernel_checks.unwritten, False)
    assert interpreted(kernel_checks.unwritten, True)


def test_gather_and_scatter(interpreted):
    interpreted(kernel_checks.core_round_trip, "triton")

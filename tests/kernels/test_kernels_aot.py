"""Every kernel and configuration of the block table, compiled for real targets without a GPU."""

import collections

import pytest
from h2tune_kernels import aot
from h2tune_kernels.blocks import read_table

# Programs on cards since 8.0 may hold at least this much shared memory: what a default must fit.
SMALLEST_CARD = 99 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 80])
def test_every_configuration_compiles_without_spills(capability, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = f"sm_{capability}"
    wgmma, bad, kernels = collections.Counter(), [], collections.Counter()
    with capsys.disabled():
        print()
        for variant in aot.table_variants(device):
            used = aot.compile_variant(variant, capability)
            label = variant.label()
            print(f"{device} {label:84} {used.registers:3} registers {used.shared:6} bytes shared"
                  f"{' wgmma' * used.wgmma}{' mma' * used.mma}")  # fmt: skip
            kernel = label.split("_")[0]
            kernels[kernel] += 1
            wgmma[kernel] += used.wgmma
            if used.spilled or used.stack:
                bad.append(f"{label} spills: {used}")
            if used.shared > aot.SHARED_LIMIT[capability]:
                bad.append(f"{label} needs too much shared memory: {used}")
            if kernel not in ("gather", "scatter") and not used.wgmma and not used.mma:
                bad.append(f"{label} uses no matrix unit: {used}")
            if kernel == "fused" and used.wgmma != (capability == 90):
                bad.append(f"{label} should use wgmma on 9.0 and cannot before: {used}")
    assert bad == []
    assert set(kernels) == {"down", "up", "fused", "outer", "gather", "scatter"}
    # `up` is 64 rows or more everywhere in 16 bits, which is what wgmma takes.
    assert (wgmma["up"] > 0) == (capability == 90)


def test_defaults_fit_every_card(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tight = []
    for r, plan, size in ((16, "fused", 40), (64, "fused", 128), (64, "around", 128),
                          (128, "around", 130)):  # fmt: skip
        shape = {"clients": 2, "n": 300, "d": 520, "f": 344, "r": r, "plan": plan, "size": size}
        for variant in aot.variants(device="a card not in the table", **shape):
            used = aot.compile_variant(variant, 80)
            if used.shared > SMALLEST_CARD or used.stack:
                tight.append((variant.label(), used))
    assert tight == []


def test_table_says_where_its_numbers_come_from():
    assert read_table()
    for row in read_table():
        assert row["source"] in ("counted", "measured"), row

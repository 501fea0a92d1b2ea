import subprocess
import sys

import pytest

from h2tune_jax.bench import command, main, rows

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "triton", "orbax", "pandas", "flax")


def test_a_quick_run_measures_skips_with_reasons_and_traces(tmp_path, capsys):
    file, plot = tmp_path / "rows.csv", tmp_path / "plot.svg"
    flags = ["--quick", "--csv", str(file), "--plot", str(plot), "--trace", str(tmp_path / "trace")]
    assert main(flags) == 0
    out = capsys.readouterr().out
    written = rows.read(file)
    assert [row["model"] for row in written] == ["mlp", "tiny", "tiny", "llama-3.2-3b"]
    measured, skipped = written[:2], written[2:]
    for row in measured:
        assert row["skipped"] is None
        assert row["seconds"] > 0
        assert 0 < row["share_of_peak"] < 1.5
        assert row["compile_seconds"] > 0
    assert measured[1]["tokens_per_second"] > 0
    assert "CUDA device only" in skipped[0]["skipped"]
    assert "GB" in skipped[1]["skipped"]
    for row in skipped:
        assert row["seconds"] is None
        assert row["skipped"] in out
    assert "where the time of one round went" in out
    assert "dot_general" in out
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--models", "minilmm"], "did you mean 'minilm'"),
        (["--models", "tiny", "--clients", "many"], "--clients: 'many' is no int"),
        (["--models", "tiny", "--clients", "0"], "clients must be at least 1"),
    ],
)
def test_bad_flags_end_with_code_2_and_their_names(flags, said, monkeypatch, capsys):
    monkeypatch.setattr(command, "_child", lambda flags: {"backend": "cpu", "devices": 2})
    assert main(flags) == 2
    assert said in capsys.readouterr().err


def test_cases_can_be_listed(monkeypatch, capsys):
    monkeypatch.setattr(command, "_child", lambda flags: {"backend": "cpu", "devices": 2})
    assert main(["--models", "mlp,tiny", "--clients", "2", "--list"]) == 0
    assert capsys.readouterr().out == "mlp 2 clients scan\ntiny 2 clients scan r=8\n"


def test_a_case_that_dies_takes_no_other_along(monkeypatch, tmp_path, capsys):
    peaks = {"float32": (1e12,) * 3}
    probed = {"backend": "cpu", "devices": 2, "about": {"device": "here"}, "peaks": peaks}
    row = dict.fromkeys(rows.COLUMNS) | {"model": "tiny", "rank": 8, "skipped": "no room"}
    answers = iter([probed, None, row])
    monkeypatch.setattr(command, "_child", lambda flags: next(answers))
    file = tmp_path / "rows.csv"
    assert main(["--models", "tiny", "--clients", "1,2", "--csv", str(file)]) == 1
    assert [row["skipped"] for row in rows.read(file)] == ["no room"]


def test_its_import_is_light():
    code = "import sys, h2tune_jax.bench; "
    code += f"print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_every_case_runs_in_a_process_of_its_own(tmp_path):
    file = tmp_path / "rows.csv"
    flags = ["--models", "mlp,tiny", "--clients", "4", "--devices", "1,2", "--axis", "vmap"]
    flags += ["--runs", "2", "--compiles", "1", "--csv", str(file)]
    command = [sys.executable, "-m", "h2tune_jax.bench", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    written = rows.read(file)
    assert [(row["model"], row["devices"]) for row in written] == [
        ("mlp", 1),
        ("mlp", 2),
        ("tiny", 1),
        ("tiny", 2),
    ]
    assert all(row["seconds"] > 0 for row in written), done.stdout

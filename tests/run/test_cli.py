"""The command: exit codes, messages on stderr, help with examples, and a run from end to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from run_folders import fill, small_disk
from typer.testing import CliRunner

from h2tune_jax import cli
from h2tune_jax.run.config import load_config
from h2tune_jax.run.folder import RunFolder, lock_folder
from h2tune_jax.run.interrupt import stop_on_interrupt
from h2tune_jax.run.presets import read_preset

COMMANDS = ("demo", "run", "compare", "report", "inspect", "export", "predict", "init")
TINY = tiny_run.TOML.replace('name = "h2tune"', 'name = "local"').replace(
    "lambda_norm = 1e-3\n", ""
)


def call(*args, input=None):
    """(exit code, stdout, stderr); an exception that got out is raised."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], input=input)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_run.write_run(tmp_path_factory.mktemp("cli"), TINY)


@pytest.fixture(scope="module")
def finished(config):
    """A folder with a finished run of `local`, and what the command printed."""
    out = config.parent / "finished"
    code, stdout, _ = call("run", config, "--out", out, "--set", "rounds=2")
    assert code == 0
    return out, stdout


# Help


def test_help_lists_the_commands_and_the_exit_codes():
    code, stdout, _ = call("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", stdout)
    text = " ".join(stdout.split())
    assert "0 done, 2 bad input or config, 3 a folder that cannot be used, 130 interrupted" in text
    assert "--install-completion" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command):
    code, stdout, _ = call(command, "--help")
    assert code == 0
    assert f"Example: h2tune {command}" in stdout


def test_without_a_command_it_shows_help():
    _, stdout, stderr = call()
    assert "Usage: " in stdout + stderr


# Bad input: exit code 2, one message, no traceback


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["gone.toml"], "gone.toml: cannot be read: No such file or directory"),
        (["CONFIG", "--set", "rouns=3"], "rouns: unknown key; allowed: name, "),
        (["CONFIG", "--set", "method.name=lcoal"], "did you mean 'local'?"),
        (["CONFIG", "--set", "rounds"], "--set rounds: expected key=value"),
        (["CONFIG", "--dry-run", "--set", "groups.narrow.task.data=sarcsm"], "did you mean 'sarcasm'?"),
        (["CONFIG", "--dry-run", "--set", "groups.narrow.targets=['x']"], "targets names 'x'"),
        (["CONFIG", "--out", "OUT", "--set", "log.wandb=true"], "pip install 'h2tune-jax[wandb]'"),
    ],
)  # fmt: skip
def test_bad_input(config, tmp_path, args, words):
    if "log.wandb=true" in args and _has_wandb():
        pytest.skip("wandb is installed")
    paths = {"CONFIG": config, "OUT": tmp_path / "out"}
    code, stdout, stderr = call("run", *[paths.get(arg, arg) for arg in args])
    assert code == cli.EXIT_INPUT == 2
    assert words in stderr
    assert stderr.startswith("h2tune: ")
    assert "Traceback" not in stdout + stderr
    assert not (tmp_path / "out").exists()


def _has_wandb():
    import importlib.util

    return importlib.util.find_spec("wandb") is not None


def test_unknown_options_are_usage_errors():
    code, _, stderr = call("run", "x.toml", "--dry")
    assert code == 2
    assert "No such option" in stderr


# A run folder that cannot be used: exit code 3


def test_folders_that_cannot_be_used(config, finished, tmp_path):
    out, _ = finished
    code, _, stderr = call("run", config, "--out", out, "--set", "rounds=2")
    assert code == cli.EXIT_FOLDER == 3
    assert "holds a run already; resume it (--resume)" in stderr
    code, _, stderr = call(
        "run", config, "--out", out, "--resume", "--set", "rounds=2", "--set", "seed=9"
    )
    assert code == 3
    assert "holds a run of another config; seed was 3 and is 9" in stderr
    for command in (["inspect"], ["report"], ["export", "--client", "narrow/0"],
                    ["predict", "--client", "narrow/0", "x"]):  # fmt: skip
        code, stdout, stderr = call(command[0], tmp_path, *command[1:])
        assert code == 3, command
        assert "run.json is missing" in stderr
        assert "Traceback" not in stdout + stderr


# What the commands do


def test_dry_run_describes_and_writes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, stdout, _ = call("run", config, "--dry-run", "--set", "groups.narrow.rank=3")
    assert code == 0
    assert "tiny: local, 3 rounds" in stdout
    assert "rank 3 on q, up: 216 parameters a client" in stdout
    assert not list(tmp_path.iterdir())


def test_run_writes_a_folder_and_says_where(finished):
    out, stdout = finished
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1]
    last = json.loads(lines[-1])["evaluation"]["trained"]
    mean = sum(last["narrow"]["accuracy"]) / 2
    assert re.search(rf"narrow, trained: .*accuracy {mean:.4g}", stdout)
    assert f"report: {out / 'report.html'}" in stdout
    assert "<html" in (out / "report.html").read_text()[:500]
    assert load_config(out / "config.toml").rounds == 2


def test_resuming_a_finished_run_changes_nothing(config, finished):
    out, _ = finished
    before = (out / "metrics.jsonl").read_bytes()
    code, stdout, _ = call("run", config, "--out", out, "--resume", "--set", "rounds=2")
    assert code == 0
    assert (out / "metrics.jsonl").read_bytes() == before
    assert "report: " in stdout


def test_report_of_several_runs(finished, tmp_path):
    out, _ = finished
    code, stdout, _ = call("report", out, out, "--out", tmp_path / "both.html")
    assert code == 0
    assert stdout.strip() == f"report: {tmp_path / 'both.html'}"
    assert (tmp_path / "both.html").stat().st_size > 1000


def test_inspect_names_the_checkpoints(finished):
    out, _ = finished
    code, stdout, _ = call("inspect", out)
    assert code == 0
    assert "local, seed 3" in stdout
    assert "2 of 2 rounds recorded" in stdout


def test_predict_gives_a_label_a_line(finished):
    out, _ = finished
    code, stdout, _ = call("predict", out, "--client", "narrow/1", "plum 7", "axe 3")
    assert code == 0
    labels = stdout.split()
    assert len(labels) == 2
    assert set(labels) <= {"beast", "fruit", "tool"}
    code, again, _ = call(
        "predict", out, "--client", "narrow/1", input='plum 7\n{"text": "axe 3"}\n'
    )
    assert (code, again) == (0, stdout)
    code, _, stderr = call("predict", out, "--client", "narrow/7", "x")
    assert code == 2
    assert "no client is called 'narrow/7'" in stderr


def test_export_writes_where_it_says(finished, tmp_path):
    out, _ = finished
    code, stdout, _ = call(
        "export", out, "--client", "narrow/1", "--format", "adapter", "--out", tmp_path / "a"
    )
    assert code == 0
    written = Path(stdout.strip().removeprefix("written: "))
    assert written.exists()
    assert list((tmp_path / "a").rglob("*.safetensors"))
    code, _, stderr = call("export", out, "--client", "narrow/1", "--format", "onnx")
    assert code == 2
    assert "onnx" in stderr


def test_an_export_to_a_full_disk_is_one_line(finished, tmp_path):
    out, _ = finished
    with small_disk(tmp_path / "disk", "1m"):
        fill(tmp_path / "disk" / "full")
        code, stdout, stderr = call(
            "export",
            out,
            "--client",
            "narrow/1",
            "--format",
            "adapter",
            "--out",
            tmp_path / "disk" / "a",
        )
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["full"]
    assert code == cli.EXIT_FOLDER == 3
    assert stdout == ""
    assert re.fullmatch(
        r"h2tune: the export cannot be written to .*: No space left on .*\n", stderr
    )


def test_what_reads_a_run_under_way_says_so(finished, tmp_path):
    out, _ = finished
    with lock_folder(RunFolder(out)):
        code, _, stderr = call("report", out, "--out", tmp_path / "x.html")
        assert (code, stderr) == (
            0,
            f"h2tune: {out} is under way: the report has what it holds so far\n",
        )
        code, stdout, _ = call("inspect", out)
        assert code == 0
        assert "running: this is what it holds so far" in stdout


def test_files_that_the_system_refuses_are_one_line(tmp_path, monkeypatch):
    from h2tune_jax.run import config

    def refuse(*args):
        raise PermissionError(13, "Permission denied", "secret.toml")

    monkeypatch.setattr(config, "load_config", refuse)
    assert call("run", "x.toml") == (3, "", "h2tune: secret.toml: Permission denied\n")


@pytest.mark.slow
def test_compare_runs_what_is_missing(config, tmp_path):
    out = tmp_path / "compared"
    args = ["compare", config, "--methods", "local", "--out", out, "--set", "rounds=1"]
    code, stdout, _ = call(*args, "--seeds", "1")
    assert code == 0
    assert "narrow" in stdout
    assert (out / "report.html").is_file()
    stamp = (out / "local" / "3" / "metrics.jsonl").stat().st_mtime_ns
    code, _, _ = call(*args, "--seeds", "2")
    assert code == 0
    assert (out / "local" / "3" / "metrics.jsonl").stat().st_mtime_ns == stamp
    assert (out / "local" / "4" / "metrics.jsonl").is_file()
    code, _, stderr = call("compare", config, "--methods", "local,locl", "--out", out)
    assert code == 2
    assert "did you mean 'local'?" in stderr


def test_init_writes_a_config_and_spares_what_is_there(tmp_path):
    path = tmp_path / "mine.toml"
    code, stdout, _ = call("init", path)
    assert code == 0
    assert f"h2tune run {path} --dry-run" in stdout
    assert path.read_text() == read_preset("init")
    assert load_config(path).name == "first"
    path.write_text("mine")
    code, _, stderr = call("init", path)
    assert code == 2
    assert "exists already" in stderr
    assert path.read_text() == "mine"
    code, _, stderr = call("init", tmp_path / "gone" / "x.toml")
    assert code == 2
    assert "cannot be written" in stderr


# Interrupts


def test_first_interrupt_is_told_and_the_old_handler_comes_back():
    said = []
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt(said.append) as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10
        while not asked() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert asked()
    assert signal.getsignal(signal.SIGINT) is before
    assert said == ["finishing this round, then saving; Ctrl-C again leaves at once"]


def test_second_interrupt_leaves_at_once_whatever_the_main_thread_does():
    """The main thread sits in compiled code that Python cannot interrupt: a lock taken twice."""
    program = """
import os, signal, sys, threading
from h2tune_jax.run.interrupt import stop_on_interrupt
with stop_on_interrupt(lambda text: print(text, flush=True)):
    print("ready", flush=True)
    import ctypes
    ctypes.CDLL(None).sleep(60); ctypes.CDLL(None).sleep(60); ctypes.CDLL(None).sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert "Ctrl-C again" in child.stdout.readline()
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=10) == 130


@pytest.mark.slow
def test_interrupted_run_exits_130_and_goes_on(config, tmp_path):
    """As a process of its own: Ctrl-C during the run, then --resume to the end."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "h2tune_jax.cli", "run", str(config), "--out", str(out),
               "--set", "rounds=100000", "--set", "evaluation.every=0",
               "--set", "checkpoints.every=1000"]  # fmt: skip
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        deadline = time.monotonic() + 120
        metrics = out / "metrics.jsonl"
        while time.monotonic() < deadline and child.poll() is None:
            if metrics.is_file() and metrics.stat().st_size > 0:
                break
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == cli.EXIT_INTERRUPTED == 130, stderr
    assert "finishing this round" in stderr
    assert f"h2tune: {out}: interrupted after " in stderr
    assert "Traceback" not in stdout + stderr
    rounds = [json.loads(line)["round"] for line in metrics.read_text().splitlines()]
    assert rounds == list(range(len(rounds)))
    assert len(rounds) >= 1
    steps = [int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(steps) == len(rounds)  # saved after its last round, though none was due

"""Correctness, then speed, on the GPU of this machine, in under 8 minutes.

    python kernels/benchmarks/gpu.py --out folder [--wheels folder]

Runs the tests marked `gpu`, and, if they pass, the benchmark. Needs JAX with CUDA in the Python that
runs it. What else is missing (jax-triton, absl-py, pytest and its parts) is installed from the
folder of wheels into a temporary folder, without any network and without touching the environment;
with no folder given it has to be there already. Writes tests.txt, triple.csv and summary.txt.
"""

import argparse
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Module -> distribution that brings it.
NEEDED = {
    "jax_triton": "jax-triton",
    "triton": "triton",
    "absl": "absl-py",
    "ml_dtypes": "ml_dtypes",
    "pytest": "pytest",
    "pluggy": "pluggy",
    "iniconfig": "iniconfig",
    "packaging": "packaging",
    "pygments": "Pygments",
}
TOTAL_SECONDS = 460.0
TEST_SECONDS = 200.0


def missing() -> list[str]:
    return [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]


def complete(wheels: pathlib.Path | None, site: str) -> str | None:
    """Install what is missing into `site`; a line to print if that cannot be done."""
    names = missing()
    if not names:
        return None
    if wheels is None:
        return (
            f"missing here: {', '.join(names)}. Install them, or pass --wheels with their wheels."
        )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--disable-pip-version-check", "--find-links", str(wheels), "--target", site]
    done = subprocess.run([*command, *names], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


def logged(command: list[str], log: pathlib.Path, environment: dict[str, str], limit: float) -> int:
    """Run with output to a file; 124 if it ran past its limit."""
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
                timeout=limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {limit:.0f} s\n")
            return 124
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--wheels", type=pathlib.Path)
    options = parser.parse_args()
    start = time.monotonic()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as site:
        problem = complete(options.wheels, site)
        if problem is not None:
            print(problem, file=sys.stderr)
            return 2
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([site, str(ROOT / "kernels")]),
            # torch and JAX share the card, and the cache must not outlive a changed kernel.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "H2TUNE_REQUIRE_GPU": "1",
        }
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
        tests += ["-p", "no:cacheprovider", "-W", "default", "--durations=5"]
        code = logged(tests, out / "tests.txt", environment, TEST_SECONDS)
        print((out / "tests.txt").read_text()[-2000:])
        if code:
            print(f"the tests did not pass (exit {code}): no benchmark of wrong numbers")
            return code
        left = TOTAL_SECONDS - (time.monotonic() - start)
        script = str(ROOT / "kernels" / "benchmarks" / "triple.py")
        bench = [sys.executable, script, "--out", str(out), "--seconds", str(left - 40)]
        code = logged(bench, out / "benchmark.txt", environment, left)
        print((out / "benchmark.txt").read_text()[-8000:])
    print(f"{time.monotonic() - start:.0f} s in all; files in {options.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())

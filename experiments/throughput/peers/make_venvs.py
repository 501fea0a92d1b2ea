"""Make one virtual environment a peer, with the exact versions of `requirements/`.

    python experiments/throughput/peers/make_venvs.py [--python python3.11] [name ...]

They land in `peers/.venvs/`, which git ignores; what is complete is left alone. Python 3.11 serves all of
them (jax 0.4.25, which fedjax 0.0.17 needs, has no build for 3.13). Every package is pinned, dependencies
included, and nothing else is resolved: torch stays at 2.13.0, and pip takes the build that it finds for
this machine. `h2tune_jax` and the bare JAX loops run in the project's own environment.
"""

import argparse
import hashlib
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
VENVS, REQUIREMENTS = HERE / ".venvs", HERE / "requirements"


def make(name, python):
    """Complete one environment."""
    file, folder = REQUIREMENTS / f"{name}.txt", VENVS / name
    stamp, digest = folder / ".complete", hashlib.sha256(file.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        print(f"{name}: complete")
        return
    print(f"{name}: installing ...", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "--no-deps", "-r", str(file)]
    subprocess.run(pip, check=True)
    stamp.write_text(digest)


def main():
    names = sorted(file.stem for file in REQUIREMENTS.glob("*.txt"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(names)}")
    parser.add_argument("--python", default="python3.11", help="the interpreter (3.11 or 3.12)")
    args = parser.parse_args()
    for name in args.names or names:
        make(name, args.python)


if __name__ == "__main__":
    main()

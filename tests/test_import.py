"""`import h2tune_jax` stays light."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "triton", "orbax", "pandas", "flax")


def test_import_is_light():
    code = (
        "import sys, time; t = time.perf_counter(); import h2tune_jax; "
        "print(time.perf_counter() - t); "
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    # The best of three: what is measured is the import, not the machine's neighbours.
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    outputs = [run.stdout.split("\n") for run in runs]
    assert {output[1] for output in outputs} == {"[]"}
    assert min(float(output[0]) for output in outputs) < 1.5


def test_import_starts_no_backend():
    code = (
        "import h2tune_jax, jax._src.xla_bridge as bridge; "
        "assert not bridge._backends, 'a backend was started at import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    import h2tune_jax

    assert len(h2tune_jax.__all__) == len(set(h2tune_jax.__all__))
    for name in h2tune_jax.__all__:
        assert hasattr(h2tune_jax, name)

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _asset(name):
    from h2tune_jax.tasks.assets import AssetUnavailable, fetch

    try:
        return fetch(name)
    except AssetUnavailable as error:
        pytest.skip(f"asset {name}: {error}")


@pytest.fixture(scope="session")
def minilm():
    return _asset("minilm")


@pytest.fixture(scope="session")
def smollm2():
    pytest.importorskip("gguf", reason="the extra `data` is not installed")
    return next(_asset("smollm2").glob("*.gguf"))


@pytest.fixture(scope="session")
def minilm_model(minilm):
    from h2tune_jax.models.load_hf import load_hf

    return load_hf(minilm)


@pytest.fixture(scope="session")
def smollm2_model(smollm2):
    from h2tune_jax.models.load_gguf import load_gguf

    return load_gguf(smollm2)

import pytest

from h2tune_jax.tasks.assets import AssetUnavailable, fetch


@pytest.fixture(scope="session")
def asset():
    """Give the folder of an asset, or skip with the reason why it is not there."""
    reasons = {}

    def get(name):
        if name not in reasons:
            try:
                return fetch(name)
            except AssetUnavailable as error:
                reasons[name] = str(error)
        return pytest.skip(reasons[name])

    return get


@pytest.fixture
def minilm_tokenizer(asset):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(asset("minilm"))

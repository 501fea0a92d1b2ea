import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from torch_models import assert_same, load_back, run_torch, tiny

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 3,
    "num_labels": 5,
}


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_classifier_logits(qkv_bias, tmp_path):
    config = transformers.ViTConfig(**SIZES, qkv_bias=qkv_bias)
    torch_model = tiny(transformers.ViTForImageClassification, config)
    model, base = load_back(torch_model, tmp_path)
    array = lambda p: jnp.asarray(p.detach().numpy())
    head = {
        "out": {
            "w": array(torch_model.classifier.weight).T,
            "b": array(torch_model.classifier.bias),
        }
    }
    images = np.random.default_rng(0).standard_normal((2, 3, 12, 12)).astype("float32")
    inputs = {"pixel_values": jnp.asarray(images)}
    ours = jax.jit(model.classify_fn)(base, None, head, inputs)
    assert_same(ours, run_torch(torch_model, {"pixel_values": images}))
    hidden = run_torch(torch_model.vit, {"pixel_values": images}, "last_hidden_state")
    assert_same(jax.jit(model.hidden_fn)(base, None, inputs), hidden)


def test_module_names_of_transformers_5_in_a_file(tmp_path):
    from safetensors.numpy import save_file

    from h2tune_jax.models.load_hf import load_hf

    torch_model = tiny(transformers.ViTModel, transformers.ViTConfig(**SIZES), seed=1)
    model, base = load_back(torch_model, tmp_path)
    new = {name: p.detach().numpy() for name, p in torch_model.state_dict().items()}
    assert any(name.startswith("layers.0.attention.q_proj") for name in new)
    save_file(new, tmp_path / "model.safetensors")
    _, again = load_hf(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), base, again))
    assert model.spec.shapes == {
        "q": (32, 32),
        "k": (32, 32),
        "v": (32, 32),
        "o": (32, 32),
        "up": (32, 48),
        "down": (48, 32),
    }

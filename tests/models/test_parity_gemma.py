import jax
import jax.numpy as jnp
import pytest
import transformers
from torch_models import assert_same, load_back, run_torch, text_batch, tiny, to_jax

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
MEMBERS = {
    "gemma": ("Gemma", {"num_key_value_heads": 1}),
    "gemma_bias": ("Gemma", {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma2": (
        "Gemma2",
        # Caps small enough to bend the logits of these models.
        {
            "sliding_window": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 20,
        },
    ),
    "gemma2_uncapped": (
        "Gemma2",
        {"sliding_window": 4, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
}


def member(name, task="CausalLM", **fields):
    family, own = MEMBERS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **own, **fields})
    return tiny(getattr(transformers, f"{family}For{task}"), config)


@pytest.mark.parametrize("name", list(MEMBERS))
def test_logits(name, tmp_path):
    torch_model = member(name)
    model, base = load_back(torch_model, tmp_path)
    logits_fn = jax.jit(model.logits_fn)
    for side in ("right", "left"):
        batch = text_batch(SIZES["vocab_size"], side)
        ours = logits_fn(base, None, to_jax(batch))
        assert_same(ours, run_torch(torch_model, batch), batch["attention_mask"])


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_classifier_logits(name, tmp_path):
    torch_model = member(name, "SequenceClassification", num_labels=5)
    model, base = load_back(torch_model, tmp_path)
    head = {"out": {"w": jnp.asarray(torch_model.score.weight.detach().numpy()).T}}
    batch = text_batch(SIZES["vocab_size"], "left")
    ours = jax.jit(model.classify_fn)(base, None, head, to_jax(batch))
    assert_same(ours, run_torch(torch_model, batch))


def test_legacy_activation_name(tmp_path):
    import json

    torch_model = member("gemma")
    torch_model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "gelu"}))
    from h2tune_jax.models.load_hf import load_hf

    model, _ = load_hf(tmp_path)
    assert model.config.activation == "gelu_tanh"

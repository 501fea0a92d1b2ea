import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from torch_models import (
    assert_same,
    load_back,
    run_torch,
    text_batch,
    tiny,
    to_jax,
    unpadded,
)

from h2tune_jax.models.load_hf import load_tokenizer

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}
ARCHS = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
}


def classifier(arch, **fields):
    config_class, model_class = ARCHS[arch]
    pad = 1 if arch == "roberta" else 0
    config = config_class(**{**SIZES, "num_labels": 5, "pad_token_id": pad, **fields})
    return tiny(model_class, config), pad


def head_of(torch_model, arch):
    array = lambda p: jnp.asarray(p.detach().numpy())
    c = torch_model.classifier
    linear = lambda m: {"w": array(m.weight).T, "b": array(m.bias)}
    return (
        {"out": linear(c)}
        if arch == "bert"
        else {"dense": linear(c.dense), "out": linear(c.out_proj)}
    )


@pytest.mark.parametrize(
    ("arch", "act"), [("bert", "gelu"), ("bert", "gelu_new"), ("bert", "relu"), ("roberta", "gelu")]
)
def test_classifier_logits(arch, act, tmp_path):
    torch_model, pad = classifier(arch, hidden_act=act)
    model, base = load_back(torch_model, tmp_path)
    batch = text_batch(SIZES["vocab_size"], pad_id=pad)
    if arch == "bert":
        batch["token_type_ids"] = (np.arange(9) % 2)[None].repeat(3, 0)
    ours = jax.jit(model.classify_fn)(base, None, head_of(torch_model, arch), to_jax(batch))
    assert_same(ours, run_torch(torch_model, batch))


@pytest.mark.parametrize("arch", list(ARCHS))
def test_padding_side_changes_nothing(arch, tmp_path):
    torch_model, pad = classifier(arch)
    model, base = load_back(torch_model, tmp_path)
    head = head_of(torch_model, arch)
    classify_fn = jax.jit(model.classify_fn)
    for side in ("left", "right"):
        batch = text_batch(SIZES["vocab_size"], side, pad)
        ours = classify_fn(base, None, head, to_jax(batch))
        alone = [run_torch(torch_model, unpadded(batch, row))[0] for row in range(3)]
        assert_same(ours, np.stack(alone))


def test_mean_pooling_needs_no_pooler(tmp_path):
    torch_model, _ = classifier("bert")
    model, base = load_back(torch_model, tmp_path, pooling="mean")
    assert "pooler" not in base
    batch = text_batch(SIZES["vocab_size"])
    hidden = run_torch(torch_model.bert, batch, "last_hidden_state")
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    head = head_of(torch_model, "bert")
    expected = mean @ np.asarray(head["out"]["w"]) + np.asarray(head["out"]["b"])
    assert_same(jax.jit(model.classify_fn)(base, None, head, to_jax(batch)), expected)


def test_old_names_of_norms(tmp_path):
    from safetensors.numpy import load_file, save_file

    torch_model, _ = classifier("bert")
    model, base = load_back(torch_model, tmp_path)
    file = tmp_path / "model.safetensors"
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): a
        for name, a in load_file(file).items()
    }
    assert any("gamma" in name for name in old)
    save_file(old, file)
    from h2tune_jax.models.load_hf import load_hf

    _, again = load_hf(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), base, again))
    del model


TEXTS = [
    "A man is eating food.",
    "Someone is having a meal.",
    "The stock market fell sharply on Tuesday after the central bank's announcement.",
]


def test_minilm_hidden_states_and_pooler(minilm, minilm_model):
    model, base = minilm_model
    torch_model = transformers.AutoModel.from_pretrained(minilm).eval()
    batch = dict(load_tokenizer(minilm)(TEXTS, padding=True, return_tensors="np"))
    ours = jax.jit(model.hidden_fn)(base, None, to_jax(batch))
    theirs = run_torch(torch_model, batch, "last_hidden_state")
    assert_same(ours, theirs, batch["attention_mask"])
    # A head that passes the pooled state on shows the pooler.
    eye = {"out": {"w": jnp.eye(384), "b": jnp.zeros(384)}}
    pooled = jax.jit(model.classify_fn)(base, None, eye, to_jax(batch))
    assert_same(pooled, run_torch(torch_model, batch, "pooler_output"))


def test_minilm_knows_a_paraphrase(minilm, minilm_model):
    model, base = minilm_model
    batch = to_jax(dict(load_tokenizer(minilm)(TEXTS, padding=True, return_tensors="np")))
    means = jax.jit(model.activations_fn)(base, batch).layers[-1]
    unit = means / jnp.linalg.norm(means, axis=-1, keepdims=True)
    cosine = unit @ unit.T
    assert cosine[0, 1] > cosine[0, 2] + 0.4

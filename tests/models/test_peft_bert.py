import json

import jax
import numpy as np
import pytest
import transformers
from torch_models import (
    assert_same,
    load_back,
    load_peft,
    random_head,
    random_sites,
    run_torch,
    text_batch,
    tiny,
    to_jax,
)

from h2tune_jax.models.export import export_merged, export_peft
from h2tune_jax.types import FederationError

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}
ARCHS = {
    "bert": (transformers.BertConfig, transformers.BertModel, 0),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel, 1),
}
LABELS = ["alpha", "beta", "gamma"]


def trained(arch, folder, kinds=None, core=True):
    config_class, model_class, pad = ARCHS[arch]
    torch_base = tiny(model_class, config_class(**SIZES, pad_token_id=pad))
    model, base = load_back(torch_base, folder)
    sites = random_sites(model, 4, core=core, kinds=kinds)
    head = random_head(model, len(LABELS))
    batch = text_batch(SIZES["vocab_size"], pad_id=pad)
    logits = jax.jit(model.classify_fn)(base, sites, head, to_jax(batch))
    plain = jax.jit(model.classify_fn)(base, None, head, to_jax(batch))
    assert np.abs(np.asarray(logits - plain)).max() > 1e-2
    return model, base, sites, head, batch, logits


@pytest.mark.parametrize("kinds", [None, ("q", "v"), ("down",), ("o", "up")])
@pytest.mark.parametrize("arch", list(ARCHS))
def test_adapter_loads_with_peft(arch, kinds, tmp_path):
    model, _, sites, head, batch, logits = trained(arch, tmp_path / "base", kinds)
    export_peft(tmp_path / "adapter", model, sites, head, base_model=str(tmp_path / "base"))
    torch_base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=len(LABELS)
    )
    loaded = load_peft(torch_base, tmp_path / "adapter")
    count = sum("lora_A" in name for name, _ in loaded.named_parameters())
    assert count == len(sites) * SIZES["num_hidden_layers"]
    assert_same(logits, run_torch(loaded, batch))


@pytest.mark.parametrize("arch", list(ARCHS))
def test_merged_loads_with_transformers(arch, tmp_path):
    model, base, sites, head, batch, logits = trained(arch, tmp_path / "base")
    export_merged(tmp_path / "merged", model, base, sites, head, labels=LABELS)
    loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.config.id2label == dict(enumerate(LABELS))
    assert_same(logits, run_torch(loaded.eval(), batch))


def test_encoder_without_a_head(tmp_path):
    model, base, sites, _, batch, _ = trained("bert", tmp_path / "base", ("q", "k"))
    hidden = jax.jit(model.hidden_fn)(base, sites, to_jax(batch))
    export_peft(tmp_path / "adapter", model, sites)
    torch_base = transformers.AutoModel.from_pretrained(tmp_path / "base")
    loaded = load_peft(torch_base, tmp_path / "adapter")
    theirs = run_torch(loaded, batch, "last_hidden_state")
    assert_same(hidden, theirs, batch["attention_mask"])
    export_merged(tmp_path / "merged", model, base, sites)
    merged = transformers.AutoModel.from_pretrained(tmp_path / "merged").eval()
    assert_same(hidden, run_torch(merged, batch, "last_hidden_state"), batch["attention_mask"])


def test_minilm_classifier(minilm, minilm_model, tmp_path):
    model, base = minilm_model
    sites, head = random_sites(model, 8, core=True), random_head(model, 6)
    batch = text_batch(30000)
    logits = jax.jit(model.classify_fn)(base, sites, head, to_jax(batch))
    export_peft(tmp_path / "adapter", model, sites, head)
    torch_base = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm, num_labels=6
    )
    loaded = load_peft(torch_base, tmp_path / "adapter")
    assert_same(logits, run_torch(loaded, batch))
    export_merged(tmp_path / "merged", model, base, sites, head)
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_same(logits, run_torch(merged.eval(), batch))


def test_mean_pooling_is_refused(tmp_path):
    torch_base = tiny(transformers.BertModel, transformers.BertConfig(**SIZES))
    model, base = load_back(torch_base, tmp_path, pooling="mean")
    sites, head = random_sites(model, 2), random_head(model, 3)
    for export in (
        lambda: export_peft(tmp_path / "x", model, sites, head),
        lambda: export_merged(tmp_path / "x", model, base, sites, head),
    ):
        with pytest.raises(FederationError, match="pooling 'mean' is ours alone; BertForSequence"):
            export()
    assert not (tmp_path / "x").exists()


def test_export_refuses_what_does_not_fit(tmp_path):
    torch_base = tiny(transformers.BertModel, transformers.BertConfig(**SIZES))
    model, base = load_back(torch_base, tmp_path)
    sites, head = random_sites(model, 2), random_head(model, 3)
    with pytest.raises(FederationError, match="no site 'gate'"):
        export_peft(tmp_path / "x", model, {**sites, "gate": sites["up"]}, head)
    with pytest.raises(FederationError, match="site 'q' has factors"):
        export_peft(tmp_path / "x", model, {"q": sites["up"]}, head)
    with pytest.raises(FederationError, match="no adapted sites"):
        export_peft(tmp_path / "x", model, {}, head)
    with pytest.raises(FederationError, match="2 labels for a head of 3"):
        export_merged(tmp_path / "x", model, base, sites, head, labels=["a", "b"])
    with pytest.raises(FederationError, match="the head has parts"):
        export_peft(tmp_path / "x", model, sites, {"dense": head["out"]})


def test_config_of_a_plain_lora(tmp_path):
    torch_base = tiny(transformers.BertModel, transformers.BertConfig(**SIZES))
    model, _ = load_back(torch_base, tmp_path)
    sites = random_sites(model, 4, alpha=8.0, kinds=("q", "v"))
    export_peft(tmp_path / "a", model, sites, random_head(model, 3), base_model="some/name")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["r"] == 4
    assert fields["lora_alpha"] == 8
    assert fields["target_modules"] == ["attention.self.query", "attention.self.value"]
    assert fields["modules_to_save"] == ["classifier"]
    assert fields["base_model_name_or_path"] == "some/name"

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
from h2tune_jax.models.prune import prune_depth
from h2tune_jax.types import FederationError

LLAMA = transformers.LlamaConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=60,
    max_position_embeddings=64,
    pad_token_id=0,
)
QWEN = transformers.Qwen2Config(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=60,
    max_position_embeddings=64,
    pad_token_id=0,
    tie_word_embeddings=True,
    use_sliding_window=True,
    sliding_window=3,
    max_window_layers=2,
)
GEMMA = transformers.Gemma2Config(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=48,
    vocab_size=60,
    sliding_window=3,
    attn_implementation="eager",
)
GPT2 = transformers.GPT2Config(
    n_embd=32,
    n_layer=3,
    n_head=4,
    vocab_size=60,
    n_positions=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CAUSAL = {"llama": LLAMA, "qwen2": QWEN, "gemma2": GEMMA, "gpt2": GPT2}


def make(name, folder):
    torch_model = tiny(transformers.AutoModelForCausalLM.from_config, CAUSAL[name])
    return load_back(torch_model, folder)


def logits_of(model, base, sites, batch):
    logits = jax.jit(model.logits_fn)(base, sites, to_jax(batch))
    plain = jax.jit(model.logits_fn)(base, None, to_jax(batch))
    assert np.abs(np.asarray(logits - plain)).max() > 1e-2
    return logits


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", None),
        ("llama", ("q", "v")),
        ("qwen2", ("k", "gate", "down")),
        ("gemma2", None),
        ("gpt2", None),
        ("gpt2", ("q", "v")),
        ("gpt2", ("k", "up")),
    ],
)
def test_language_model(name, kinds, tmp_path):
    model, base = make(name, tmp_path / "base")
    sites = random_sites(model, 4, core=True, kinds=kinds)
    batch = text_batch(60)
    logits = logits_of(model, base, sites, batch)
    load = transformers.AutoModelForCausalLM.from_pretrained
    eager = {"attn_implementation": "eager"}

    export_peft(tmp_path / "adapter", model, sites)
    loaded = load_peft(load(tmp_path / "base", **eager), tmp_path / "adapter")
    assert_same(logits, run_torch(loaded, batch), batch["attention_mask"])

    export_merged(tmp_path / "merged", model, base, sites)
    merged, info = load(tmp_path / "merged", output_loading_info=True, **eager)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(logits, run_torch(merged.eval(), batch), batch["attention_mask"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_classifier(name, tmp_path):
    model, base = make(name, tmp_path / "base")
    sites, head = random_sites(model, 4), random_head(model, 3)
    batch = text_batch(60)
    logits = jax.jit(model.classify_fn)(base, sites, head, to_jax(batch))
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    export_peft(tmp_path / "adapter", model, sites, head)
    loaded = load_peft(load(tmp_path / "base", num_labels=3), tmp_path / "adapter")
    assert_same(logits, run_torch(loaded, batch))
    export_merged(tmp_path / "merged", model, base, sites, head, pad_token_id=0)
    assert_same(logits, run_torch(load(tmp_path / "merged").eval(), batch))


def test_fused_attention_is_one_lora_of_rank_3r(tmp_path):
    from safetensors.numpy import load_file

    model, _ = make("gpt2", tmp_path / "base")
    sites = random_sites(model, 4)
    export_peft(tmp_path / "adapter", model, sites)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.transformer.h.1.attn.c_attn.lora_{}.weight"
    a, b = tensors[name.format("A")], tensors[name.format("B")]
    assert a.shape == (12, 32)
    assert b.shape == (96, 12)
    np.testing.assert_array_equal(a[4:8].T, sites["k"].a[1])
    np.testing.assert_array_equal(b[32:64, 4:8].T, sites["k"].b[1])
    assert not b[32:64, :4].any()
    assert not b[32:64, 8:].any()
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert fields["r"] == 4
    assert fields["rank_pattern"] == {"attn.c_attn": 12}
    assert fields["alpha_pattern"] == {"attn.c_attn": 18}
    assert fields["fan_in_fan_out"] is True


def test_ranks_and_scales_may_differ_by_kind(tmp_path):
    model, base = make("gpt2", tmp_path / "base")
    sites = {
        **random_sites(model, 4, kinds=("q", "up")),
        **random_sites(model, 2, kinds=("v",), alpha=9.0),
        **random_sites(model, 3, kinds=("down",)),
    }
    batch = text_batch(60)
    export_peft(tmp_path / "adapter", model, sites)
    torch_base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = load_peft(torch_base, tmp_path / "adapter")
    logits = logits_of(model, base, sites, batch)
    assert_same(logits, run_torch(loaded, batch), batch["attention_mask"])


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt2"])
def test_pruned_model_goes_out_as_what_it_is(name, tmp_path):
    model, base = make(name, tmp_path / "base")
    for i, option in enumerate(({"every": 2}, {"first": 2}, {"layers": (1, 2)})):
        small, small_base = prune_depth(model, base, **option)
        assert small.spec.num_layers == 2
        sites = random_sites(small, 2)
        batch = text_batch(60)
        out = export_merged(tmp_path / str(i), small, small_base, sites)
        merged = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
        ours = jax.jit(small.logits_fn)(small_base, sites, to_jax(batch))
        assert_same(ours, run_torch(merged.eval(), batch), batch["attention_mask"])


def test_pruned_adapter_needs_its_pruned_base(tmp_path):
    model, base = make("gpt2", tmp_path / "base")
    small, small_base = prune_depth(model, base, layers=(0, 2))
    sites, batch = random_sites(small, 2), text_batch(60)
    for wrong in ("", "some/hub-id", str(tmp_path / "base")):
        with pytest.raises(FederationError, match="depth-pruned, so its adapter fits no published"):
            export_peft(tmp_path / "adapter", small, sites, base_model=wrong)
    pruned = export_merged(tmp_path / "pruned", small, small_base)
    export_peft(tmp_path / "adapter", small, sites, base_model=str(pruned))
    torch_base = transformers.AutoModelForCausalLM.from_pretrained(pruned)
    loaded = load_peft(torch_base, tmp_path / "adapter")
    logits = jax.jit(small.logits_fn)(small_base, sites, to_jax(batch))
    assert_same(logits, run_torch(loaded, batch), batch["attention_mask"])


def test_vit_classifier(tmp_path):
    from h2tune_jax.models.load_hf import load_hf

    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=12,
        patch_size=4,
    )
    torch_model = tiny(transformers.ViTForImageClassification, config)
    torch_model.save_pretrained(tmp_path / "base")
    model, base = load_hf(tmp_path / "base")
    sites, head = random_sites(model, 4, kinds=("q", "down")), random_head(model, 3)
    images = np.random.default_rng(0).standard_normal((2, 3, 12, 12)).astype("float32")
    logits = jax.jit(model.classify_fn)(base, sites, head, to_jax({"pixel_values": images}))
    load = transformers.ViTForImageClassification.from_pretrained
    export_peft(tmp_path / "adapter", model, sites, head)
    torch_base = load(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    loaded = load_peft(torch_base, tmp_path / "adapter")
    assert_same(logits, run_torch(loaded, {"pixel_values": images}))
    export_merged(tmp_path / "merged", model, base, sites, head)
    merged = load(tmp_path / "merged").eval()
    assert_same(logits, run_torch(merged, {"pixel_values": images}))


def test_bfloat16_merge_keeps_its_dtype(tmp_path):
    from safetensors import safe_open

    torch_model = tiny(transformers.AutoModelForCausalLM.from_config, LLAMA)
    model, base = load_back(torch_model, tmp_path / "base", dtype="bfloat16")
    out = export_merged(tmp_path / "merged", model, base, random_sites(model, 4))
    with safe_open(out / "model.safetensors", "np") as file:
        kinds = {file.get_slice(name).get_dtype() for name in list(file.keys())}
    assert kinds == {"BF16"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    import torch

    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16

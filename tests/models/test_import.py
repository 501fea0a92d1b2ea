"""Import: what it refuses and how it says so, sharded files, GGUF details, and what it costs."""

import json
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CONFIGS, tiny_base

from h2tune_jax.models import (
    build,
    config_from_hf,
    export_merged,
    load_gguf,
    load_hf,
    load_tokenizer,
)
from h2tune_jax.models.load_gguf import read_config as read_gguf_config
from h2tune_jax.models.load_gguf import unpermute
from h2tune_jax.models.load_hf import read_config as read_hf_config
from h2tune_jax.types import FederationError


@pytest.fixture
def folder(tmp_path):
    model, base = tiny_base("llama")
    return export_merged(tmp_path / "llama", model, base)


def edit_config(folder, **fields):
    file = folder / "config.json"
    merged = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: v for name, v in merged.items() if v is not ...}))


def edit_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refuses(folder, message, **choices):
    with pytest.raises(FederationError, match=message):
        load_hf(folder, **choices)


@pytest.mark.parametrize("arch", list(CONFIGS))
def test_a_written_folder_reads_back_exactly(arch, tmp_path):
    model, base = tiny_base(arch)
    export_merged(tmp_path, model, base)
    again, read = load_hf(tmp_path)
    assert again.config == model.config == read_hf_config(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, base, read)


def test_sharded_files(folder):
    model, base = load_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    again, read = load_hf(folder)
    assert again is model
    jax.tree.map(np.testing.assert_array_equal, base, read)
    (folder / "b.safetensors").unlink()
    refuses(folder, r"b\.safetensors: no such file")
    index.write_text(json.dumps({"weight_map": {**weight_map, names[1]: "a.safetensors"}}))
    save_file({name: tensors[name] for name in names[1::2]}, folder / "b.safetensors")
    refuses(folder, rf"a\.safetensors: tensor '{names[1]}' is missing")


def test_half_precision_files(folder):
    _, base = load_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: a.astype(np.float16) for n, a in tensors.items()}, folder / "model.safetensors")
    _, half = load_hf(folder)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), base, half)
    _, stored = load_hf(folder, dtype="float32", param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored)} == {"bfloat16"}


def test_missing_folder(tmp_path):
    refuses(tmp_path / "nothing", "nothing: no such folder")
    refuses(tmp_path, r"config\.json is missing")


def test_unknown_hub_id():
    refuses("someone/nothing-of-this-name", "no such folder, and the hub did not give it")


def test_unsupported_architecture(folder):
    edit_config(folder, model_type="mamba")
    refuses(folder, "architecture 'mamba' is unsupported; allowed: .*llama")
    edit_config(folder, model_type="lama")
    refuses(folder, "did you mean 'llama'")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "hidden_size must be of type int, got 'wide'"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"hidden_act": "swash"}, "hidden_act 'swash' is unsupported.*did you mean 'swish'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is unsupported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is unsupported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder = True is unsupported"),
        (
            {"model_type": "bert", "position_embedding_type": "relative_key"},
            "position_embedding_type = 'relative_key'",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types has 1 entries for num_hidden_layers = 2",
        ),
    ],
)
def test_wrong_config(folder, fields, message):
    edit_config(folder, **fields)
    refuses(folder, message)


def test_missing_fields_mean_what_transformers_means_by_them():
    mistral = {n: v for n, v in CONFIGS["mistral"].items() if n != "sliding_window"}
    assert config_from_hf(mistral).windows == (4096, 4096)
    assert config_from_hf({**mistral, "sliding_window": None}).windows == ()
    caps = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    gemma = {n: v for n, v in CONFIGS["gemma2"].items() if n not in caps}
    config = config_from_hf(gemma)
    assert (config.attention_cap, config.logit_cap, config.windows) == (50.0, 30.0, (4096, None))
    assert config_from_hf({**gemma, "final_logit_softcapping": None}).logit_cap is None


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    refuses(folder, r"config\.json: not JSON")
    (folder / "config.json").write_text("[1]")
    refuses(folder, "expected a JSON object, got list")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"dtype": "float61"}, "dtype 'float61' is unknown; allowed: float32, bfloat16"),
        ({"remat": "dost"}, "remat 'dost' is unknown.*did you mean 'dots'"),
        ({"pooling": "max"}, "pooling 'max' is unknown"),
    ],
)
def test_wrong_choice(folder, choice, message):
    refuses(folder, message, **choice)


def test_missing_tensor(folder):
    edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refuses(folder, r"tensor 'layers\.1\.mlp\.up_proj\.weight' is missing")


def test_missing_output_matrix(folder):
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    refuses(folder, r"tensor 'lm_head\.weight' is missing")
    with pytest.raises(FederationError, match=r"tensor 'lm_head\.weight' is missing"):
        read_hf_config(folder)
    edit_config(folder, architectures=["LlamaModel"])
    assert load_hf(folder)[0].config == read_hf_config(folder)
    assert read_hf_config(folder).unembed == "none"


def test_unexpected_tensor(folder):
    extra = {"model.layers.2.mlp.up_proj.weight": np.zeros((4, 4), np.float32)}
    edit_tensors(folder, lambda t: t.update(extra))
    refuses(folder, r"tensor 'layers\.2\.mlp\.up_proj\.weight' is unexpected")


def test_wrong_shape(folder):
    wrong = {"model.norm.weight": np.zeros(7, np.float32)}
    edit_tensors(folder, lambda t: t.update(wrong))
    refuses(folder, r"tensor 'norm\.weight' has shape \(7,\), the config says \(32,\)")


def test_truncated_file(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    refuses(folder, r"model\.safetensors: truncated: tensor '.*' ends at byte \d+, the file at \d+")
    file.write_bytes(data[:40])
    refuses(folder, "truncated or not a safetensors file")
    file.write_bytes(data[:8] + b"x" + data[9:])
    refuses(folder, "the header is not JSON")
    file.unlink()
    refuses(folder, "no such file")


def test_pooler_missing_says_what_does_without(tmp_path):
    model, base = tiny_base("bert")
    export_merged(tmp_path, model, base)
    edit_tensors(tmp_path, lambda t: t.pop("pooler.dense.weight"))
    refuses(tmp_path, r"'pooler\.dense\.weight' is missing; pooling='mean' does without")
    load_hf(tmp_path, pooling="mean")


def test_missing_tokenizer(folder):
    with pytest.raises(FederationError, match="no tokenizer"):
        load_tokenizer(folder)


def test_gguf_pairs_are_put_apart():
    # Two heads of width 6: neighbours (0 1)(2 3)(4 5) belong to pairs (i, i + 3).
    rows = np.arange(12.0)[:, None] * np.ones((1, 2))
    np.testing.assert_array_equal(unpermute(rows, 2)[:, 0], [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11])


def test_gguf_that_is_none(tmp_path):
    with pytest.raises(FederationError, match="no such file"):
        load_gguf(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUFnothing")
    with pytest.raises(FederationError, match="truncated or not a GGUF file"):
        load_gguf(tmp_path / "x.gguf")


def write_gguf(file, *, arch="llama", scaling=None, drop=(), rope_freqs=None):
    """A small float32 GGUF of the tiny llama, with Q and K paired as such files are."""
    gguf = pytest.importorskip("gguf")
    model, base = tiny_base("llama")
    c = model.config
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(c.num_layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.mlp_width)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    if scaling:
        writer.add_rope_scaling_type(scaling)
    tensors = {
        "token_embd": base["tokens"]["w"],
        "output_norm": base["final_norm"]["w"],
        "output": base["unembed"]["w"].T,
    }
    layers = base["layers"]
    for i in range(c.num_layers):
        for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
            w = np.asarray(layers["attention"][ours]["w"][i]).T
            if ours in "qk":
                heads = c.num_heads if ours == "q" else c.num_kv_heads
                w = w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
            tensors[f"blk.{i}.attn_{theirs}"] = w
        for kind in ("gate", "up", "down"):
            tensors[f"blk.{i}.ffn_{kind}"] = layers["mlp"][kind]["w"][i].T
        tensors[f"blk.{i}.attn_norm"] = layers["attention_norm"]["w"][i]
        tensors[f"blk.{i}.ffn_norm"] = layers["mlp_norm"]["w"][i]
    for name, array in tensors.items():
        if name not in drop:
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(array, np.float32))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return base


def test_small_gguf(tmp_path):
    file = tmp_path / "tiny.gguf"
    base = write_gguf(file)
    model, read = load_gguf(file)
    jax.tree.map(np.testing.assert_array_equal, base, read)
    assert model.spec == build(model.config).spec
    assert read_gguf_config(file) == model.config
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(FederationError, match="truncated"):
        load_gguf(file)


def test_gguf_refusals(tmp_path):
    file = tmp_path / "tiny.gguf"
    for options, message in (
        ({"arch": "phi3"}, "architecture 'phi3' is unsupported"),
        ({"drop": ("blk.1.ffn_up",)}, r"tensor 'layers\.1\.mlp\.up_proj\.weight' is missing"),
        ({"rope_freqs": np.full(4, 3.0, np.float32)}, "'rope_freqs.weight' is none of Llama 3's"),
    ):
        write_gguf(file, **options)
        with pytest.raises(FederationError, match=message):
            load_gguf(file)
    # The file of the last case: its frequencies belong to the config.
    with pytest.raises(FederationError, match=r"'rope_freqs\.weight' is none"):
        read_gguf_config(file)


def test_gguf_llama3_frequencies(tmp_path):
    from h2tune_jax.models.attention import rope_frequencies

    model, _ = tiny_base("llama")
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    # A period long enough that some pair is stretched.
    fields = {**CONFIGS["llama"], "rope_theta": 500000.0}
    plain = rope_frequencies(config_from_hf(fields))
    scaled = rope_frequencies(config_from_hf({**fields, "rope_scaling": scaling}))
    assert (plain / scaled).max() > 7.9
    object.__setattr__(model.config, "rope_theta", 500000.0)
    try:
        write_gguf(tmp_path / "x.gguf", rope_freqs=(plain / scaled).astype(np.float32))
    finally:
        object.__setattr__(model.config, "rope_theta", CONFIGS["llama"]["rope_theta"])
    read, _ = load_gguf(tmp_path / "x.gguf")
    assert dict(read.config.rope_scaling) == scaling
    assert read_gguf_config(tmp_path / "x.gguf") == read.config


def test_smollm2_tokenizer(smollm2):
    tokenizer = load_tokenizer(smollm2)
    text = "<|im_start|>user\nIt's 1234 cafés, naïve?<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[0] == "<|im_start|>"
    assert pieces[6:10] == ["1", "2", "3", "4"]
    assert "hi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )


@pytest.mark.slow
def test_smollm2_tokenizer_is_that_of_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    ours = load_tokenizer(smollm2)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in (
        "The capital of France is",
        "Question: 123 + 4567 = x?\n\n  hi",
        "don't, café naïve 日本語 🙂",
        "<|im_start|>user\nhello<|im_end|>\n",
        "def f(x):\n    return x",
    ):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


_MEASURE = """
    import sys, time, jax, jax.numpy as jnp
    from h2tune_jax.models import load_gguf, load_hf
    import gguf  # imported before the measurement, like JAX
    jnp.zeros(3).block_until_ready()

    def peak():
        # Not getrusage: its peak survives exec, so it would be the test runner's.
        with open("/proc/self/status") as status:
            words = status.read().split()
        return int(words[words.index("VmHWM:") + 1]) * 1024

    before, start = peak(), time.perf_counter()
    load = load_gguf if sys.argv[1].endswith(".gguf") else load_hf
    model, base = load(sys.argv[1])
    jax.block_until_ready(base)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    print((peak() - before) / size, time.perf_counter() - start, size)
"""


def measure(source):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURE), str(source)],
        capture_output=True,
        text=True,
        check=True,
    )
    ratio, seconds, size = map(float, run.stdout.split())
    print(f"{source}: peak {ratio:.2f} x {size / 1e6:.0f} MB in {seconds:.1f} s")
    return ratio


def test_memory_to_import_smollm2(smollm2):
    assert 0.9 < measure(smollm2) < 1.3


def test_memory_to_import_safetensors(tmp_path):
    # 158 MB, a quarter of it in one tensor.
    fields = {
        **CONFIGS["llama"],
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "vocab_size": 20000,
        "tie_word_embeddings": True,
    }
    model = build(config_from_hf(fields))
    base = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32),
        jax.eval_shape(model.init_fn, jax.random.key(0)),
    )
    export_merged(tmp_path, model, base)
    assert 0.9 < measure(tmp_path) < 1.3

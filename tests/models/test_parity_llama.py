import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from torch_models import assert_same, load_back, run_torch, text_batch, tiny, to_jax

from h2tune_jax.models import generate, load_tokenizer

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Each row has the odd things of one member of the family.
MEMBERS = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama_linear": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 3, "head_dim": 16}),
    "mistral_full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen25": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
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
    assert ("unembed" in base) == (not torch_model.config.tie_word_embeddings)


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2", "qwen3"])
def test_classifier_logits(name, tmp_path):
    torch_model = member(name, "SequenceClassification", num_labels=5)
    model, base = load_back(torch_model, tmp_path)
    assert model.config.unembed == "none"
    head = {"out": {"w": jnp.asarray(torch_model.score.weight.detach().numpy()).T}}
    classify_fn = jax.jit(model.classify_fn)
    for side in ("right", "left"):
        batch = text_batch(SIZES["vocab_size"], side)
        assert_same(classify_fn(base, None, head, to_jax(batch)), run_torch(torch_model, batch))


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2"])
def test_generation_is_greedy_decoding(name, tmp_path):
    torch_model = member(name)
    model, base = load_back(torch_model, tmp_path)
    batch = text_batch(SIZES["vocab_size"], "left")
    prompt = to_jax(batch)
    run = jax.jit(
        lambda base, inputs: generate(
            model, base, None, inputs, max_new_tokens=12, eos_ids=(7, 2), pad_id=0
        )
    )
    ours = run(base, prompt)
    import torch

    with torch.no_grad():
        theirs = torch_model.generate(
            **{key: torch.tensor(a) for key, a in batch.items()},
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[7, 2],
            pad_token_id=0,
        ).numpy()[:, batch["input_ids"].shape[1] :]
    padded = np.zeros((3, 12), int)
    padded[:, : theirs.shape[1]] = theirs
    np.testing.assert_array_equal(ours.tokens, padded)
    # Padding on the other side gives the same continuation.
    other = text_batch(SIZES["vocab_size"], "right")
    for row, length in enumerate((9, 6, 4)):
        other["input_ids"][row, :length] = batch["input_ids"][row, -length:]
    again = run(base, to_jax(other))
    np.testing.assert_array_equal(again.tokens, padded)
    np.testing.assert_array_equal(again.lengths, ours.lengths)


PROMPTS = [
    "The capital of France is",
    "Question: A train travels 60 miles in 1.5 hours. What is its average speed?\nAnswer:",
    "Once upon a time",
]

QUIET_PROMPTS = [
    "My favourite food is",
    "Question: A train travels 60 miles in 1.5 hours. What is its average speed?\nAnswer:",
    "Apples are",
]


@pytest.fixture(scope="module")
def smollm2_torch(smollm2):
    import torch

    torch.set_num_threads(1)
    # Dequantised by transformers itself; the tokenizer is held against its own elsewhere.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name
    )
    tokenizer = load_tokenizer(smollm2)
    assert model.dtype == torch.float32
    return model.eval(), tokenizer


@pytest.mark.slow
def test_smollm2_logits(smollm2_model, smollm2_torch):
    """On prompts where float32 rounding itself stays well below the tolerance; see docs/models.md."""
    model, base = smollm2_model
    torch_model, tokenizer = smollm2_torch
    batch = dict(tokenizer(QUIET_PROMPTS, padding=True, return_tensors="np"))
    assert not batch["attention_mask"].all()
    ours = jax.jit(model.logits_fn)(base, None, to_jax(batch))
    assert_same(ours, run_torch(torch_model, batch), batch["attention_mask"])


@pytest.mark.slow
def test_smollm2_generates_the_same_tokens(smollm2_model, smollm2_torch):
    import torch

    model, base = smollm2_model
    torch_model, tokenizer = smollm2_torch
    batch = dict(tokenizer(PROMPTS, padding=True, return_tensors="np"))
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        theirs = torch_model.generate(
            **{name: torch.tensor(a) for name, a in batch.items()},
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        ).numpy()[:, batch["input_ids"].shape[1] :]
    ours = jax.jit(
        lambda base, inputs: generate(model, base, None, inputs, max_new_tokens=24, eos_ids=2)
    )(base, to_jax(batch))
    assert theirs.shape[1] == 24
    np.testing.assert_array_equal(ours.tokens, theirs)


ENGLISH = (
    "The little boat left the harbour before dawn. By noon the wind had turned, and the crew decided "
    "to wait behind the island until the storm was over. Nobody on the shore knew where they were."
)


@pytest.mark.slow
def test_smollm2_prefers_english_to_shuffled_words(smollm2_model, smollm2_torch):
    model, base = smollm2_model
    _, tokenizer = smollm2_torch
    words = ENGLISH.split()
    shuffled = " ".join(np.random.default_rng(0).permutation(words))

    @jax.jit
    def perplexity(base, batch):
        log_probs = jax.nn.log_softmax(model.logits_fn(base, None, batch)[:, :-1])
        ids, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
        taken = jnp.take_along_axis(log_probs, ids[..., None], axis=-1)[..., 0]
        return jnp.exp(-(taken * mask.astype(jnp.float32)).sum(1) / mask.sum(1).astype(jnp.float32))

    batch = dict(
        tokenizer([ENGLISH, shuffled], padding=True, padding_side="right", return_tensors="np")
    )
    english, other = perplexity(base, to_jax(batch))
    assert other > 5 * english

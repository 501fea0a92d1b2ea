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

from h2tune_jax.models.generate import generate

SIZES = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "vocab_size": 60,
    "n_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_inner": 40, "activation_function": "relu", "scale_attn_weights": False},
        {"tie_word_embeddings": False},
    ],
)
def test_logits(fields, tmp_path):
    torch_model = tiny(transformers.GPT2LMHeadModel, transformers.GPT2Config(**SIZES, **fields))
    model, base = load_back(torch_model, tmp_path)
    logits_fn = jax.jit(model.logits_fn)
    for side in ("right", "left"):
        batch = text_batch(SIZES["vocab_size"], side)
        ours = logits_fn(base, None, to_jax(batch))
        theirs = run_torch(torch_model, batch, positions=True)
        assert_same(ours, theirs, batch["attention_mask"])


def test_classifier_logits_whatever_the_padding(tmp_path):
    config = transformers.GPT2Config(**SIZES, num_labels=5)
    torch_model = tiny(transformers.GPT2ForSequenceClassification, config)
    model, base = load_back(torch_model, tmp_path)
    head = {"out": {"w": jnp.asarray(torch_model.score.weight.detach().numpy()).T}}
    classify_fn = jax.jit(model.classify_fn)
    for side in ("right", "left"):
        batch = text_batch(SIZES["vocab_size"], side)
        ours = classify_fn(base, None, head, to_jax(batch))
        alone = [run_torch(torch_model, unpadded(batch, row))[0] for row in range(3)]
        assert_same(ours, np.stack(alone))


def test_generation(tmp_path):
    import torch

    torch_model = tiny(transformers.GPT2LMHeadModel, transformers.GPT2Config(**SIZES))
    model, base = load_back(torch_model, tmp_path)
    batch = text_batch(SIZES["vocab_size"], "left")
    with torch.no_grad():
        theirs = torch_model.generate(
            **{name: torch.tensor(a) for name, a in batch.items()},
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=59,
            pad_token_id=0,
        ).numpy()[:, batch["input_ids"].shape[1] :]
    ours = jax.jit(
        lambda base, inputs: generate(
            model, base, None, inputs, max_new_tokens=10, eos_ids=59, pad_id=0
        )
    )(base, to_jax(batch))
    np.testing.assert_array_equal(np.asarray(ours.tokens)[:, : theirs.shape[1]], theirs)

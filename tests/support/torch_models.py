"""Small torch models with random weights, and batches that pad on either side: the other half of parity."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from h2tune_jax.adapters.site import SiteAdapter
from h2tune_jax.models.load_hf import load_hf

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
peft = pytest.importorskip("peft", reason="the extra `parity` is not installed")

torch.set_num_threads(1)
LENGTHS = (9, 6, 4)
ATOL = 1e-4


def tiny(cls, config, seed=0):
    """A torch model in which every parameter matters: norms, biases and wide logits included."""
    torch.manual_seed(seed)
    model = cls(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape)
            p.copy_(p + 0.2 * noise if p.dim() == 1 else 0.2 * noise)
    return model


def load_back(model, folder, **choices):
    """Save a torch model and import it."""
    model.save_pretrained(folder)
    return load_hf(folder, **choices)


def text_batch(vocab, side="right", pad_id=0, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, vocab, (len(LENGTHS), max(LENGTHS)))
    mask = np.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    return {"input_ids": np.where(mask, ids, pad_id), "attention_mask": mask}


def unpadded(batch, row):
    keep = batch["attention_mask"][row].astype(bool)
    return {name: array[row : row + 1, keep] for name, array in batch.items()}


def to_jax(batch):
    return {
        name: jnp.asarray(a, jnp.int32 if np.issubdtype(a.dtype, np.integer) else jnp.float32)
        for name, a in batch.items()
    }


def run_torch(model, batch, field="logits", *, positions=False):
    batch = {name: torch.tensor(a) for name, a in batch.items()}
    if positions:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return getattr(model(**batch), field).float().numpy()


def random_sites(model, rank, *, core=False, alpha=6.0, kinds=None, seed=1):
    """Adapters with all factors away from zero."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32)
    layers = model.config.num_layers
    return {
        kind: SiteAdapter(
            a=draw(layers, d, rank),
            core=draw(layers, rank, rank) if core else None,
            b=draw(layers, rank, f),
            scale=alpha / rank,
        )
        for kind, (d, f) in model.spec.shapes.items()
        if kinds is None or kind in kinds
    }


def random_head(model, num_labels, seed=2):
    """A head with biases away from zero."""
    head = model.init_head_fn(num_labels)(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), head
    )


def assert_same(ours, theirs, mask=None, atol=ATOL):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    if mask is not None:
        ours, theirs = ours[mask.astype(bool)], theirs[mask.astype(bool)]
    assert np.abs(theirs).max() > 0.05, "a comparison of zeros says nothing"
    assert np.abs(ours - theirs).max() < atol


def load_peft(torch_base, folder):
    """`PeftModel.from_pretrained`, whose own use of a deprecated name in transformers we let pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.PeftModel.from_pretrained(torch_base, folder).eval()

"""What every family promises, held on small models without torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIGS, classify_fn, tiny_base

from h2tune_jax.adapters import relation
from h2tune_jax.adapters.site import SiteAdapter
from h2tune_jax.models import build, config_from_hf, generate, prune_depth
from h2tune_jax.types import FederationError

DISTINCT = ("bert", "qwen3", "gemma2", "gpt2", "vit")  # one of each definition


def batch_of(model, size=3, steps=7, seed=0):
    rng = np.random.default_rng(seed)
    c = model.config
    if c.image_size:
        images = rng.standard_normal((size, c.channels, c.image_size, c.image_size))
        return {"pixel_values": jnp.asarray(images, jnp.float32)}
    lengths = np.maximum(steps - 2 * np.arange(size), 2)
    mask = np.arange(steps)[None] < lengths[:, None]
    ids = rng.integers(3, c.vocab_size, (size, steps))
    return {
        "input_ids": jnp.asarray(np.where(mask, ids, 0), jnp.int32),
        "attention_mask": jnp.asarray(mask, jnp.int32),
    }


def sites_of(model, rank=3, seed=1, **fields):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32)
    n = model.config.num_layers
    return {
        kind: SiteAdapter(
            a=draw(n, d, rank), core=draw(n, rank, rank), b=draw(n, rank, f), scale=2.0, **fields
        )
        for kind, (d, f) in model.spec.shapes.items()
    }


def classify(arch, sites="own", batch=None, **choices):
    model, base = tiny_base(arch, **choices)
    head = model.init_head_fn(4)(jax.random.key(5))
    sites = sites_of(model) if sites == "own" else sites
    return classify_fn(arch, **choices)(base, sites, head, batch or batch_of(model))


@pytest.mark.parametrize("arch", DISTINCT)
def test_adapters_reach_every_site(arch):
    """Each kind's adapter, in each layer, moves the output and gets a gradient."""
    model, base = tiny_base(arch)
    head = model.init_head_fn(4)(jax.random.key(5))
    batch = batch_of(model)
    loss = lambda sites: jnp.square(model.classify_fn(base, sites, head, batch)).sum()
    grads = jax.jit(jax.grad(loss))(sites_of(model))
    for kind, grad in grads.items():
        for factor in (grad.a, grad.core, grad.b):
            assert (jnp.abs(factor).max(axis=(1, 2)) > 0).all(), kind


def test_absent_kinds_are_unadapted():
    model, _ = tiny_base("llama")
    sites = sites_of(model)
    zero = {kind: jax.tree.map(jnp.zeros_like, site) for kind, site in sites.items()}
    some = {"q": sites["q"], "down": sites["down"]}
    np.testing.assert_allclose(
        classify("llama", some), classify("llama", {**zero, **some}), atol=1e-6
    )
    np.testing.assert_array_equal(classify("llama", None), classify("llama", {}))
    with pytest.raises(
        FederationError, match="bert has no site 'gate'; it has q, k, v, o, up, down"
    ):
        classify("bert", {"gate": sites["gate"]})


@pytest.mark.parametrize(
    ("arch", "remat"),
    [
        ("bert", "full"),
        pytest.param("qwen2", "dots", marks=pytest.mark.slow),
        pytest.param("gpt2", "dots_no_batch", marks=pytest.mark.slow),
    ],
)
def test_remat_changes_no_number(arch, remat):
    def gradient(choice):
        model, base = tiny_base(arch, remat=choice)
        head = model.init_head_fn(4)(jax.random.key(5))
        batch = batch_of(model)
        loss = lambda sites: jnp.square(model.classify_fn(base, sites, head, batch)).sum()
        return jax.jit(jax.grad(loss))(sites_of(model))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradient(None),
        gradient(remat),
    )


def test_remat_keeps_less():
    """What the forward pass leaves for the backward pass, counted in saved values."""

    def saved(choice):
        model, base = tiny_base("llama", remat=choice)
        head = model.init_head_fn(4)(jax.random.key(5))
        batch = batch_of(model)
        loss = lambda sites: model.classify_fn(base, sites, head, batch).sum()
        kept = jax.eval_shape(lambda s: jax.tree.leaves(jax.vjp(loss, s)[1]), sites_of(model))
        return sum(leaf.size for leaf in kept)

    assert saved("full") < saved("dots") < saved(None)


@pytest.mark.parametrize("arch", DISTINCT)
def test_bfloat16_is_close(arch):
    exact = classify(arch)
    model, base = tiny_base(arch, dtype="bfloat16")
    rounded = classify(arch, dtype="bfloat16")
    assert rounded.dtype == jnp.float32
    hidden = jax.eval_shape(model.hidden_fn, base, sites_of(model), batch_of(model))
    assert hidden.dtype == jnp.bfloat16
    assert 0 < jnp.abs(rounded - exact).max() < 0.05 * jnp.abs(exact).max() + 0.05


@pytest.mark.parametrize("arch", ["bert", "roberta", "mistral", "gemma2", "gpt2"])
def test_padding_changes_nothing(arch):
    model, _ = tiny_base(arch)
    batch = batch_of(model)
    alone = classify(arch, batch=batch)
    wide = {
        n: jnp.pad(a, ((0, 0), (0, 4)), constant_values=7 if n == "input_ids" else 0)
        for n, a in batch.items()
    }
    np.testing.assert_allclose(classify(arch, batch=wide), alone, atol=2e-5)
    left = {n: jnp.roll(a, 4, axis=1) for n, a in wide.items()}
    np.testing.assert_allclose(classify(arch, batch=left), alone, atol=2e-5)


@pytest.mark.parametrize("arch", ["bert", "gemma2", "gpt2"])
def test_an_empty_text_stays_finite(arch):
    """Rows that fill up a batch may have no token at all."""
    model, base = tiny_base(arch)
    head = model.init_head_fn(4)(jax.random.key(5))
    batch = batch_of(model)
    batch = {name: array.at[1].set(0) for name, array in batch.items()}
    loss = lambda sites: jnp.square(model.classify_fn(base, sites, head, batch)).sum()
    for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(sites_of(model))):
        assert jnp.isfinite(leaf).all()


def test_mean_pooling_sees_tokens_only():
    model, base = tiny_base("llama", pooling="mean")
    batch = batch_of(model)
    hidden = np.asarray(model.hidden_fn(base, None, batch))
    head = model.init_head_fn(4)(jax.random.key(5))
    mask = np.asarray(batch["attention_mask"], bool)
    mean = np.stack([row[keep].mean(axis=0) for row, keep in zip(hidden, mask, strict=True)])
    ours = model.classify_fn(base, None, head, batch)
    np.testing.assert_allclose(ours, mean @ np.asarray(head["out"]["w"]), atol=1e-5)


def test_clients_share_the_base_under_vmap():
    model, base = tiny_base("bert")
    batches = [batch_of(model, seed=i) for i in range(3)]
    clients = [
        (sites_of(model, seed=i), model.init_head_fn(4)(jax.random.key(i)), batches[i])
        for i in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *clients)
    together = jax.jit(jax.vmap(model.classify_fn, in_axes=(None, 0, 0, 0)))(base, *stacked)
    for i, client in enumerate(clients):
        np.testing.assert_allclose(together[i], classify_fn("bert")(base, *client), atol=1e-5)


def test_dropout_follows_its_key():
    model, base = tiny_base("llama")
    batch = batch_of(model)
    sites = sites_of(model, dropout=0.5)
    run = jax.jit(lambda key: model.hidden_fn(base, sites, batch, key=key))
    first = run(jax.random.key(0))
    np.testing.assert_array_equal(first, run(jax.random.key(0)))
    assert jnp.abs(first - run(jax.random.key(1))).max() > 1e-3
    plain = jax.jit(model.hidden_fn)(base, sites_of(model), batch)
    np.testing.assert_allclose(run(None), plain, atol=1e-5)


def test_head_of_each_kind():
    for arch, parts in (("bert", {"out"}), ("roberta", {"dense", "out"}), ("gpt2", {"out"})):
        model, _ = tiny_base(arch)
        head = model.init_head_fn(5)(jax.random.key(0))
        assert set(head) == parts
        assert head["out"]["w"].shape == (32, 5)
        assert ("b" in head["out"]) == (arch != "gpt2")
        assert 0.01 < head["out"]["w"].std() < 0.03
    with pytest.raises(FederationError, match="num_labels must be at least 1"):
        model.init_head_fn(0)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "gpt2"])
def test_cached_generation_is_reading_everything_again(arch):
    model, base = tiny_base(arch)
    sites = sites_of(model)
    batch = batch_of(model)
    out = jax.jit(
        lambda base, sites, batch: generate(
            model, base, sites, batch, max_new_tokens=6, eos_ids=(59,), pad_id=0
        )
    )(base, sites, batch)
    logits_fn = jax.jit(model.logits_fn)
    mask = np.asarray(batch["attention_mask"], bool)
    for row in range(3):
        ids = np.asarray(batch["input_ids"])[row][mask[row]].tolist()
        expected = []
        while len(expected) < 6 and 59 not in expected:
            # Padded to one length, so that it compiles once.
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(ids)] = ids
            seen = (np.arange(16) < len(ids)).astype(np.int32)[None]
            inputs = {"input_ids": jnp.asarray(padded), "attention_mask": jnp.asarray(seen)}
            expected.append(int(logits_fn(base, sites, inputs)[0, len(ids) - 1].argmax()))
            ids.append(expected[-1])
        assert out.lengths[row] == len(expected)
        assert out.tokens[row].tolist() == expected + [0] * (6 - len(expected))


def test_generation_stops_at_any_end_token():
    model, base = tiny_base("llama")
    batch = batch_of(model)
    run = lambda **options: jax.jit(
        lambda b, x: generate(model, b, None, x, max_new_tokens=5, **options)
    )(base, batch)
    end = int(run(eos_ids=59, pad_id=0).tokens[0, 1])
    stopped = run(eos_ids=(59, end), pad_id=9)
    assert stopped.lengths[0] <= 2
    assert (stopped.tokens[0, stopped.lengths[0] :] == 9).all()


def test_generation_refuses():
    model, base = tiny_base("llama")
    batch = batch_of(model)
    with pytest.raises(FederationError, match="36 tokens are longer than the context, 32"):
        generate(model, base, None, batch, max_new_tokens=30, eos_ids=2)
    with pytest.raises(FederationError, match="max_new_tokens must be at least 1"):
        generate(model, base, None, batch, max_new_tokens=0, eos_ids=2)
    model, base = tiny_base("bert")
    with pytest.raises(FederationError, match="only causal models have a cache"):
        generate(model, base, None, batch, max_new_tokens=3, eos_ids=2)
    with pytest.raises(FederationError, match="bert: this model has no next-token logits"):
        model.logits_fn(base, None, batch)


@pytest.mark.parametrize("arch", DISTINCT)
def test_activations(arch):
    model, base = tiny_base(arch)
    batch = batch_of(model)
    # Recording goes through remat as well.
    means = jax.jit(tiny_base(arch, remat="dots")[0].activations_fn)(base, batch)
    tokens = jax.jit(lambda b, x: model.activations_fn(b, x, tokens=True))(base, batch)
    n = model.config.num_layers
    assert means.layers.shape == (n, 3, 32)
    assert set(means.inputs) == set(model.spec.shapes)
    mask = batch.get("attention_mask", jnp.ones(tokens.layers.shape[1:3], jnp.int32))
    mask = mask.astype(jnp.float32)[None, :, :, None]
    average = lambda x: (x * mask).sum(axis=2) / mask.sum(axis=2)
    np.testing.assert_allclose(means.layers, average(tokens.layers), atol=1e-5)
    for kind, (d, f) in model.spec.shapes.items():
        assert means.inputs[kind].shape == (n, 3, d)
        assert means.outputs[kind].shape == (n, 3, f)
        np.testing.assert_allclose(means.inputs[kind], average(tokens.inputs[kind]), atol=1e-5)
    # The recorded pairs are input and output of the site's own weight.
    for kind, path in (("v", ("attention", "v")), ("down", ("mlp", "down"))):
        site = base["layers"][path[0]][path[1]]
        y = jnp.einsum("lbtd,ldf->lbtf", tokens.inputs[kind], site["w"])
        y = y + site["b"][:, None, None] if "b" in site else y
        np.testing.assert_allclose(tokens.outputs[kind], y, atol=1e-4)
    outputs = jax.jit(model.spec.layer_outputs_fn)(base, batch)
    np.testing.assert_allclose(outputs, means.layers, atol=1e-5)


def test_activations_feed_the_relation():
    small, small_base = prune_depth(*tiny_base("llama"), first=1)
    model, base = tiny_base("gpt2")
    batch = batch_of(model, size=4)
    outputs = lambda m, b: jax.jit(m.spec.layer_outputs_fn)(b, batch)
    grams = relation.gram(outputs(small, small_base))
    reference = relation.gram(outputs(model, base))
    matrix = relation.cka(grams, reference)
    assert matrix.shape == (2, 1)
    np.testing.assert_allclose(matrix.sum(axis=0), 1, atol=1e-6)


def test_pruning_skips_layers():
    model, base = tiny_base("gemma2")
    batch = batch_of(model)
    same, same_base = prune_depth(model, base, every=1)
    assert same is model
    assert same_base is base
    second, second_base = prune_depth(model, base, layers=[1])
    assert second.spec.num_layers == 1
    assert second.spec.shapes == model.spec.shapes
    assert second.config.windows == (None,)
    # A layer whose branches add nothing may as well be gone.
    mute = jax.tree.map(lambda leaf: leaf, base)
    for name in ("attention_post_norm", "mlp_post_norm"):
        w = mute["layers"][name]["w"]
        mute["layers"][name] = {"w": w.at[0].set(-1.0)}
    np.testing.assert_allclose(
        jax.jit(second.hidden_fn)(second_base, None, batch),
        jax.jit(model.hidden_fn)(mute, None, batch),
        atol=1e-5,
    )


def test_other_layers_are_another_architecture():
    # Adapters of one architecture are averaged: equal shapes alone do not make one.
    model, base = tiny_base("llama")
    names = {
        prune_depth(model, base, **option)[0].spec.name
        for option in ({"every": 1}, {"first": 1}, {"layers": [0]}, {"layers": [1]})
    }
    assert len(names) == 3  # whole; the first layer, said twice; the second
    twice = prune_depth(*prune_depth(model, base, layers=[1, 0]), first=1)[0]
    assert twice.config.kept == (1,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of every, first and layers"),
        ({"every": 2, "first": 1}, "exactly one of every, first and layers"),
        ({"every": 0}, "every must be at least 1"),
        ({"first": 3}, r"first must lie in 1 \.\.\. 2, got 3"),
        ({"layers": [0, 2]}, r"layers must lie in 0 \.\.\. 1"),
    ],
)
def test_pruning_refuses(options, message):
    with pytest.raises(FederationError, match=message):
        prune_depth(*tiny_base("llama"), **options)


@pytest.mark.parametrize(
    ("arch", "inputs", "message"),
    [
        ("bert", {"ids": np.zeros((1, 2), np.int32)}, "input_ids is missing; given: ids"),
        ("bert", {"input_ids": np.zeros(3, np.int32)}, r"input_ids must be integers \[B, T\]"),
        ("bert", {"input_ids": np.zeros((1, 3), np.float32)}, r"got float32\[1, 3\]"),
        (
            "gpt2",
            {"input_ids": np.zeros((1, 40), np.int32)},
            "40 tokens are longer than the context, 32",
        ),
        (
            "llama",
            {"input_ids": np.zeros((1, 3), np.int32), "attention_mask": np.ones((1, 4), np.int32)},
            "attention_mask has shape",
        ),
        ("vit", {"pixel_values": np.zeros((1, 3, 8, 8), np.float32)}, "pixel_values must be"),
        ("vit", {"input_ids": np.zeros((1, 3), np.int32)}, "pixel_values is missing"),
    ],
)
def test_inputs_refused(arch, inputs, message):
    model, base = tiny_base(arch)
    with pytest.raises(FederationError, match=message):
        model.hidden_fn(base, None, {name: jnp.asarray(a) for name, a in inputs.items()})


def test_equal_configs_give_one_model():
    first = build(config_from_hf(CONFIGS["llama"]))
    assert build(config_from_hf(dict(CONFIGS["llama"]))) is first
    assert build(config_from_hf(CONFIGS["llama"], dtype="bfloat16")) is not first
    hash(first.spec)


def test_importing_the_package_imports_no_heavy_library():
    import subprocess
    import sys

    code = (
        "import sys, h2tune_jax.models as m;"
        "bad = {'torch', 'transformers', 'safetensors', 'gguf', 'peft', 'huggingface_hub'};"
        "print(sorted(bad & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

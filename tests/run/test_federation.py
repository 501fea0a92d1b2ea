"""What a config builds: specifications and bases, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file
from tiny import tiny_base
from tiny_run import tiny_federation

import h2tune_jax as h2
from h2tune_jax import aggregate
from h2tune_jax.models import export_merged, load_hf, prune_depth
from h2tune_jax.models.model import base_shapes
from h2tune_jax.run.byte_tokenizer import ByteTokenizer
from h2tune_jax.run.catalog import build_method
from h2tune_jax.run.config import PruneConfig, make_config, parse_config
from h2tune_jax.run.events import Notice
from h2tune_jax.run.federation import Cut, build_federation, format_cut
from h2tune_jax.run.folder import RunFolder
from h2tune_jax.run.loop import simulate
from h2tune_jax.run.notices import read_notices
from h2tune_jax.run.use import predict
from h2tune_jax.tasks import corpora
from h2tune_jax.types import Batch, FederationError

SHAPES = {
    "bert": {"family": "bert", "width": 8, "layers": 2, "heads": 2, "mlp_width": 12},
    "llama": {
        "family": "llama", "width": 8, "layers": 2, "heads": 2, "kv_heads": 1, "mlp_width": 12,
    },
    "gpt2": {"family": "gpt2", "width": 8, "layers": 2, "heads": 2, "mlp_width": 12},
    "gemma2": {"family": "gemma2", "width": 8, "layers": 2, "heads": 2, "mlp_width": 12},
    "qwen3": {"family": "qwen3", "width": 8, "layers": 2, "heads": 2, "mlp_width": 12},
}  # fmt: skip


def one_group(folder, task, *, shape="bert", count=2, probe=None, budget=None, **model):
    """A config of one group with a random model."""
    model = {"source": "random", "tokenizer": "bytes", "shape": SHAPES[shape], **model}
    if shape == "bert":
        model["pooling"] = "mean"
    data = {
        "rounds": 1,
        "method": {"name": "local"},
        "groups": [{"name": "one", "count": count, "rank": 2, "model": model, "task": task}],
    }
    if budget is not None:
        data["groups"][0]["budget"] = budget
    return make_config(data | ({"probe": probe} if probe else {}))


# Specifications and bases


def test_specifications_say_what_the_config_says(folder):
    federation = tiny_federation(folder, "groups.wide.alpha=4", "groups.wide.budget.steps=5",
                       "groups.wide.budget.epochs=none")  # fmt: skip
    narrow, wide = federation.specs
    assert (narrow.name, narrow.num_clients, narrow.rank, narrow.kinds) == (
        "narrow",
        2,
        2,
        ("q", "up"),
    )
    assert (wide.model.num_layers, wide.model.shapes["q"], wide.alpha) == (3, (12, 12), 4.0)
    assert wide.budget == h2.Budget(batch_size=4, steps=5)
    assert narrow.budget == h2.Budget(batch_size=4, epochs=1)
    facts = federation.groups[0]
    assert facts.labels == ("beast", "fruit", "tool")
    assert facts.client_names == ("narrow/0", "narrow/1")
    head = jax.eval_shape(narrow.init_head_fn, jax.eval_shape(jax.random.key, 0))
    assert head["out"]["w"].shape == (8, 3)


def test_equal_configs_give_equal_specifications(folder):
    one, other = tiny_federation(folder), tiny_federation(folder)
    assert one.specs == other.specs  # so that programs are compiled once
    assert hash(one.specs) == hash(other.specs)
    jax.tree.map(np.testing.assert_array_equal, one.bases, other.bases)
    jax.tree.map(np.testing.assert_array_equal, (one.train, one.test), (other.train, other.test))


@pytest.mark.parametrize("family", SHAPES)
def test_random_models_of_every_text_family(folder, family):
    task = {"data": str(folder / "words.jsonl"), "train": 4, "test": 4, "max_length": 8}
    config = one_group(folder, task, shape=family)
    federation = build_federation(config)
    shapes = build_federation(config, weights=False)
    facts = federation.groups[0]
    assert facts.model is not None
    assert (facts.model.config.arch, facts.model.config.mlp_width) == (family, 12)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert all(jax.tree.leaves(jax.tree.map(same, federation.bases, shapes.bases)))
    assert federation.specs == shapes.specs
    assert jax.tree.structure(federation.bases[0]) == jax.tree.structure(
        base_shapes(facts.model.config)
    )


def test_pruned_groups_share_the_whole_model(folder):
    task = {"data": str(folder / "words.jsonl"), "train": 4, "test": 4, "max_length": 8}
    config = one_group(folder, task)
    (group,) = config.groups
    pruned = group.model.model_copy(update={"prune": PruneConfig(first=1)})
    small = group.model_copy(update={"name": "small", "model": pruned})
    config = config.model_copy(update={"groups": (group, small)})
    federation = build_federation(config)
    whole, part = federation.bases
    assert part["tokens"]["w"] is whole["tokens"]["w"]
    first = lambda leaf, full: np.testing.assert_array_equal(leaf, full[:1])
    jax.tree.map(first, part["layers"], whole["layers"])
    assert [spec.model.num_layers for spec in federation.specs] == [2, 1]
    shapes = build_federation(config, weights=False)
    assert shapes.bases[1]["layers"]["mlp"]["up"]["w"].shape == (1, 8, 12)


@pytest.mark.parametrize("weights", [True, False])
def test_groups_on_one_pruned_model_share_its_layers(folder, weights):
    task = {"data": str(folder / "words.jsonl"), "train": 4, "test": 4, "max_length": 8}
    config = one_group(folder, task, prune={"first": 1})
    (group,) = config.groups
    twin = group.model_copy(update={"name": "twin"})
    federation = build_federation(
        config.model_copy(update={"groups": (group, twin)}), weights=weights
    )
    for one, other in zip(*map(jax.tree.leaves, federation.bases), strict=True):
        assert one is other


def checkpoints(folder, *names):
    """Write two checkpoints of one config, with other weights each: -> their folders."""
    model, base = tiny_base("bert")
    for place, name in enumerate(names):
        scale = lambda leaf, place=place: (1 + place) * leaf
        export_merged(folder / name, model, jax.tree.map(scale, base))
    return [str(folder / name) for name in names]


def of_sources(folder, *models):
    """A config of a group on each of some models."""
    task = {"data": str(folder / "words.jsonl"), "train": 4, "test": 4, "max_length": 8}
    groups = [
        {"name": f"g{i}", "rank": 2, "task": task, "model": {"tokenizer": "bytes", **model}}
        for i, model in enumerate(models)
    ]
    return make_config({"rounds": 1, "method": {"name": "local"}, "groups": groups})


def test_two_checkpoints_of_one_config_are_two_architectures(folder, tmp_path):
    one, other = checkpoints(tmp_path, "plain", "tuned")
    (tmp_path / "again").symlink_to(one)
    again, short = str(tmp_path / "again"), {"first": 1}
    config = of_sources(
        folder, {"source": one}, {"source": other}, {"source": again},
        {"source": one, "prune": short}, {"source": again, "prune": short},
    )  # fmt: skip
    federation = build_federation(config)
    assert [*aggregate.architectures(federation.specs).values()] == [(0, 2), (1,), (3, 4)]
    for spec, group in zip(federation.specs, federation.groups):
        assert group.model is not None
        assert group.model.spec == spec.model
    assert build_federation(config, weights=False).specs == federation.specs
    # Where the checkpoints lie, and which group comes first, is no part of the names.
    config = of_sources(
        folder, *({"source": x} for x in checkpoints(tmp_path / "x", "tuned", "plain"))
    )
    names = [spec.model.name for spec in federation.specs]
    assert [s.model.name for s in build_federation(config, weights=False).specs] == names[1::-1]


def test_a_model_of_one_source_keeps_its_name(folder, tmp_path):
    """Its name is folded into random keys: what runs drew before they would draw no more."""
    one, other = checkpoints(tmp_path, "plain", "tuned")
    config = of_sources(folder, {"source": one}, {"source": other, "prune": {"first": 1}})
    models = load_hf(one)[0], prune_depth(*load_hf(other), first=1)[0]
    for spec, model in zip(build_federation(config).specs, models):
        assert spec.model == model.spec


def test_what_is_described_without_weights_is_refused_as_with_them(folder, tmp_path):
    """A causal model whose output matrix is missing."""
    place = export_merged(tmp_path / "llama", *tiny_base("llama"))
    tensors = load_file(place / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "lm_head" not in k}, place / "model.safetensors")
    for weights in (True, False):
        with pytest.raises(FederationError, match=r"group 'g0': .*'lm_head\.weight' is missing"):
            build_federation(of_sources(folder, {"source": str(place)}), weights=weights)


def test_images(folder, monkeypatch):
    rng = np.random.default_rng(0)
    digits = corpora.Digits(
        rng.integers(0, 256, (40, 28, 28), np.uint8), rng.integers(0, 10, 40).astype(np.int32)
    )
    monkeypatch.setattr(corpora, "load_mnist", lambda: {"train": digits})
    shape = {
        "family": "vit", "width": 8, "layers": 1, "heads": 2, "mlp_width": 8,
        "image_size": 28, "patch_size": 14, "channels": 1,
    }  # fmt: skip
    task = {"data": "mnist", "train": 6, "test": 10}
    config = make_config(
        {
            "rounds": 1,
            "method": {"name": "local"},
            "groups": [
                {"name": "one", "count": 2, "rank": 2, "task": task,
                 "model": {"source": "random", "shape": shape}},
            ],
        }
    )  # fmt: skip
    federation = build_federation(config)
    pixels = federation.train[0].examples["pixel_values"]
    assert pixels.shape == (2, 6, 1, 28, 28)
    assert pixels.dtype == np.float32
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)
    # Each picture stands by its own label.
    flat = {image.tobytes(): label for image, label in zip(digits.images, digits.labels)}
    seen = np.round((pixels[1, :, 0] * 0.5 + 0.5) * 255).astype(np.uint8)
    labels = federation.train[0].examples["labels"][1]
    assert [flat[image.tobytes()] for image in seen] == labels.tolist()


@pytest.mark.parametrize(
    ("kind", "shape", "task"),
    [
        ("classification", "llama", {"pair": "{other}"}),
        ("regression", "bert", {"target": "size"}),
        ("causal_lm", "llama", {"prompt": "{text} is", "answer": " {label}"}),
        ("multiple_choice", "gpt2", {"prompt": "{text}", "choices": "options", "label": "right"}),
    ],
)
def test_every_kind_of_task_has_a_loss(tmp_path, kind, shape, task):
    rows = [
        {"text": f"thing {i}", "other": "x", "label": "ab"[i % 2], "size": i / 9, "right": i % 2,
         "options": ["one", "two"]}
        for i in range(30)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = {"data": str(path), "kind": kind, "train": 4, "test": 6, "max_length": 16, **task}
    federation = build_federation(one_group(tmp_path, task, shape=shape))
    (spec,), (base,), (data,) = federation.specs, federation.bases, federation.train
    head = None if spec.init_head_fn is None else spec.init_head_fn(jax.random.key(0))
    batch = Batch(jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), data.examples), jnp.ones(4, bool))
    run = jax.jit(lambda batch: spec.loss_fn(h2.Adapters({}, head), base, batch, None)[0])
    loss = float(run(batch))
    assert np.isfinite(loss)
    assert loss > 0
    labels = {"classification": ("a", "b"), "multiple_choice": ("0", "1")}.get(kind, ())
    assert federation.groups[0].labels == labels
    assert np.isnan(federation.groups[0].majority) == (not labels)


def test_bfloat16_base_with_float32_adapters_trains(folder):
    """Under strict promotion, close to float32, and the adapters stay float32."""
    ends = {}
    text = tiny_run.TOML.replace('name = "h2tune"', 'name = "local"')
    text = text.replace("lambda_norm = 1e-3", "")
    for dtype in ("float32", "bfloat16"):
        config = parse_config(text, [f"groups.*.model.dtype={dtype}"], folder=folder)
        federation, method = build_federation(config), build_method(config)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(federation.bases)} == {dtype}
        specs, bases, train = (part[:1] for part in federation[:3])
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        start = jax.tree.map(np.asarray, state.clients[0].params)
        round_fn = h2.make_round(method, specs)
        state, metrics = round_fn(state, bases, train, None, None, method.hyper, np.uint32(0))
        after = state.clients[0].params
        assert {leaf.dtype.name for leaf in jax.tree.leaves(after)} == {"float32"}
        assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (start, after))))
        ends[dtype] = np.asarray(metrics.clients["narrow"]["loss"])
    assert np.all(ends["float32"] != ends["bfloat16"])
    np.testing.assert_allclose(ends["bfloat16"], ends["float32"], rtol=5e-3)


def test_microbatches_split_the_loss(folder):
    whole = tiny_federation(folder)
    parts = tiny_federation(folder, "groups.narrow.budget.microbatches=2")
    assert parts.specs[0].loss_fn is not whole.specs[0].loss_fn
    assert parts.specs[1] == whole.specs[1]
    spec, base, data = parts.specs[0], parts.bases[0], parts.train[0]
    batch = Batch(jax.tree.map(lambda x: jnp.asarray(x[0, :4]), data.examples), jnp.ones(4, bool))
    adapters = h2.Adapters({}, spec.init_head_fn(jax.random.key(0)))
    losses = [jax.jit(s.loss_fn)(adapters, base, batch, None) for s in (spec, whole.specs[0])]
    np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-6)


def write_choices(folder):
    """Write questions with two choices each: -> a task that asks them."""
    rows = [{"text": f"thing {i}", "options": ["red", "blue"], "right": i % 2} for i in range(40)]
    path = folder / "choices.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "data": str(path), "kind": "multiple_choice", "train": 8, "test": 9, "max_length": 16,
        "prompt": "{text}", "choices": "options", "label": "right",
    }  # fmt: skip


def test_microbatches_are_tested_and_asked_like_whole_batches(tmp_path):
    """In batches that no number of parts of theirs divides, and row by row."""
    ends, answers = [], []
    for name, parts in (("whole", 1), ("parts", 2)):
        config = one_group(
            tmp_path, write_choices(tmp_path), shape="gpt2", count=1,
            budget={"batch_size": 4, "microbatches": parts},
        )  # fmt: skip
        evaluation = config.evaluation.model_copy(update={"batch_size": 5})
        config = config.model_copy(update={"evaluation": evaluation})
        result = simulate(config, out=tmp_path / name)
        ends.append(result.records[-1]["evaluation"]["trained"]["one"])
        question = {"text": "thing 3", "options": ["red", "blue"]}
        answers.append(predict(tmp_path / name, "one/0", question))
    for name, value in ends[0].items():
        np.testing.assert_allclose(ends[1][name], value, rtol=1e-4)
    assert answers[0] == answers[1]
    assert answers[0] in ("red", "blue")


# Texts that do not fit


def test_what_is_cut_is_counted_once_and_said(folder, tmp_path):
    lines = (folder / "words.jsonl").read_text().splitlines()
    lengths = [1 + len(json.loads(line)["text"]) for line in lines]
    task = {"data": str(folder / "words.jsonl"), "train": 51, "test": 18, "max_length": 8}
    config = one_group(folder, task)  # two clients, tested on the same rows
    (facts,) = build_federation(config, weights=False).groups
    lost = [length - 8 for length in lengths if length > 8]
    assert facts.cut == Cut(120, len(lost), sum(lost), 8)
    text = f"{len(lost)} of 120 texts cut to 8 tokens, by {sum(lost)} tokens in all"
    assert format_cut(facts.cut) == text
    told, out = [], tmp_path / "run"
    for _ in range(2):
        simulate(config, out=out, resume=True, observers=[told.append])
    notice = Notice(f"group 'one': {text}")
    assert told[0] == notice
    assert [line["text"] for line in read_notices(RunFolder(out))] == [notice.text]
    assert all(format_cut(group.cut) == "" for group in tiny_federation(folder).groups)


def test_every_choice_is_a_text(tmp_path):
    task = {**write_choices(tmp_path), "train": 10, "test": 20, "max_length": 13}
    (facts,) = build_federation(one_group(tmp_path, task, shape="gpt2"), weights=False).groups
    # Begin, "thing 12" and " blue" are 14 tokens, with "thing 3" 13.
    assert facts.cut == Cut(80, 30, 30, 13)


def test_choices_that_the_cut_makes_one_are_refused(tmp_path):
    rows = [
        {"text": f"thing {i}", "options": ["it is red", "it is blue"], "right": 0}
        for i in range(30)
    ]
    path = tmp_path / "alike.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = {
        **write_choices(tmp_path), "data": str(path), "labels": ["0", "1"], "max_length": 7,
    }  # fmt: skip
    words = r"group 'one', row 0: two choices of 'thing \d+' are one .* 7 tokens; raise max_length"
    with pytest.raises(FederationError, match=words):
        build_federation(one_group(tmp_path, task, shape="gpt2", count=1), weights=False)


# What cannot be built


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("groups.wide.task.data=sarcsm", "no data set is called 'sarcsm'; .* did you mean 'sarcasm'"),
        ("groups.wide.task.data=/nowhere/x.jsonl", "there is no file /nowhere/x.jsonl"),
        ("groups.wide.task.suite=mth/choice", "'mth/choice' is unknown; .* did you mean 'math'"),
        ("groups.wide.task.train=50", "parity.jsonl': split 'group wide': 150 rows are asked for"),
        ("groups.wide.task.label=lable", "no field is called 'lable'"),
        ("groups.wide.task.labels=['even', 'uneven']", "'odd', which is outside the label set"),
        ("groups.wide.task.text={txt}", "asks for the field 'txt'.*did you mean 'text'"),
        ("groups.wide.targets=['qq']", "cohort 'wide': targets names 'qq'"),
        ("groups.wide.model.source=/nowhere/x.gguf", "group 'wide': /nowhere/x.gguf: no such file"),
        ("groups.wide.model.prune.first=4", "group 'wide': prune_depth: first must lie in 1 ... 3"),
        ("groups.wide.model.shape.family=brt", "group 'wide': architecture 'brt'.*'bert'"),
        ("groups.wide.task.partition={kind='pathological', classes=3}", "group 'wide', task.partition: "),
        ("groups.wide.task.partition={kind='by_key', key='text', min_examples=2}", "only 0 values"),
    ],
)  # fmt: skip
def test_refused(folder, override, words):
    drop = ["groups.wide.model.shape=none"] if "source" in override else []
    if override.startswith("groups.wide.model.source"):
        drop.append("groups.wide.model.tokenizer=none")
    with pytest.raises(FederationError, match=words):
        tiny_federation(folder, override, *drop)


def test_two_groups_cannot_both_take_the_rest(folder):
    changes = [f"groups.wide.task.data={folder / 'words.jsonl'}", "groups.*.task.train=none"]
    with pytest.raises(FederationError, match="'narrow', 'wide' each take all that is left"):
        tiny_federation(folder, *changes)


def test_one_label_is_no_task(tmp_path):
    (tmp_path / "same.jsonl").write_text(
        '{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}\n' * 3
    )
    task = {"data": str(tmp_path / "same.jsonl"), "train": 1, "test": 1, "max_length": 8}
    with pytest.raises(FederationError, match=r"group 'one': .*all rows have the label 'x'"):
        build_federation(one_group(tmp_path, task, count=1))


# The tokenizer of bytes


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    encoded = tokenizer(["añ", ""], ["b", "c"])
    assert encoded["input_ids"][0] == [1, 101, 199, 181, 3, 102]
    assert encoded["token_type_ids"][0] == [0, 0, 0, 0, 1, 1]
    assert tokenizer.decode(encoded["input_ids"][0]) == "añb"
    assert tokenizer.decode([1, 101, 2], skip_special_tokens=False) == "<begin>a<end>"
    assert tokenizer(["añ"], add_special_tokens=False)["input_ids"] == [[101, 199, 181]]
    assert tokenizer(["añ"], truncation=True, max_length=2)["input_ids"] == [[1, 101]]
    assert tokenizer.vocab_size == 260

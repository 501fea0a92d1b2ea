"""Settings: what is read, what is refused and with which words, what is written back."""

import contextlib
import re
import tomllib
from pathlib import Path

import pytest
import tiny_run
from hypothesis import given
from hypothesis import strategies as st

from h2tune_jax.models.families import FAMILIES, config_from_hf
from h2tune_jax.run import settings, toml_text
from h2tune_jax.run.byte_tokenizer import ByteTokenizer
from h2tune_jax.run.config import (
    ConfigError,
    RunConfig,
    config_digest,
    config_toml,
    load_config,
    make_config,
    parse_config,
)
from h2tune_jax.run.load_models import _hf_fields
from h2tune_jax.run.presets import read_preset
from h2tune_jax.types import FederationError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("config")
    tiny_run.write_run(path)
    return path


def refusal(text=tiny_run.TOML, *overrides, **options) -> str:
    with pytest.raises(ConfigError) as error:
        parse_config(text, overrides, where="run.toml", **options)
    return str(error.value)


def test_reads_and_fills_in(folder):
    config = load_config(folder / "tiny.toml")
    assert [group.name for group in config.groups] == ["narrow", "wide"]
    assert config.groups[1].client_names == ("wide/0", "wide/1", "wide/2")
    assert config.groups[0].budget.epochs == 1
    assert config.groups[0].task.data == str(folder / "words.jsonl")
    assert config.method.options == {"learning_rate": 1e-2, "lambda_norm": 1e-3}
    assert config.checkpoints.metric == "accuracy"


@pytest.mark.parametrize("preset", ["demo", "init"])
def test_presets_are_valid_and_repeat(preset):
    config = parse_config(read_preset(preset))
    assert parse_config(config_toml(config)) == config


def test_what_is_written_reads_back_equal(folder):
    config = load_config(folder / "tiny.toml", ["method.optimizer={name='sgd', momentum=0.5}"])
    again = parse_config(config_toml(config))
    assert again == config
    assert config_digest(again) == config_digest(config)


def test_settings_are_frozen(folder):
    config = load_config(folder / "tiny.toml")
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 9  # pyright: ignore
    with pytest.raises(ValueError, match="frozen"):
        config.groups[0].rank = 9


# Each: what is changed in tiny_run.TOML to what, the key that is named, words of the reason, and how the
# line begins that is named: by default the last line of what was put in.
REFUSED = [
    ("rounds = 3", "rounds = 3\nrouns = 4", "rouns", "did you mean 'rounds'?"),
    ("rounds = 3", "rounds = 'three'", "rounds", "must be a whole number, not 'three'"),
    ("rounds = 3", "rounds = 0", "rounds", "at least 1, not 0"),
    ("rounds = 3", "rounds = 3.0", "rounds", "must be a whole number, not 3.0"),
    ("rounds = 3", "", "rounds", "missing; expected a whole number", None),
    ("display = false", "display = 'no'", "log.display", "true or false, not 'no'"),
    ("batch_size = 8", "every = -1", "evaluation.every", "at least 0, not -1"),
    ("batch_size = 8", "moments = ['train']", "evaluation.moments.0", "did you mean 'trained'?"),
    ("batch_size = 8", "moments = []", "evaluation.moments", "at least one"),
    ("rank = 2", "", "groups.0.rank", "give it here, or as method.rank", "[[groups]]"),
    ("rank = 4", "rank = 0", "groups.1.rank", "at least 1, not 0"),
    ("rank = 4", "rank = 4\nweight = 'all'", "groups.1.weight", "'examples'"),
    ("rank = 4", "rank = 4\ndropout = 1.0", "groups.1.dropout", "less than 1, not 1.0"),
    ('name = "wide"', 'name = "nar row"', "groups.1.name", "only letters"),
    ('name = "wide"', 'name =  "narrow"', "groups.1.name", "two groups are called 'narrow'"),
    ('targets = ["q", "up"]', 'targets = "q"', "groups.0.targets", "must be a list, not 'q'"),
    ('"random"', '"minilm"', "groups.0.model.shape", "only source 'random'", "shape ="),
    ('tokenizer = "bytes"', "", "groups.0.model.tokenizer", "needs a tokenizer", "[groups.model]"),
    ('pooling = "mean"', 'pooling = "max"', "groups.0.model.pooling", "allowed: native, mean"),
    ('pooling = "mean"', "prune = {}", "groups.0.model.prune", "not none"),
    (
        'pooling = "mean"', "prune = { every = 2, first = 1 }", "groups.0.model.prune.first",
        "not every and first",
    ),
    ('pooling = "mean"', 'dtype = "float16"', "groups.0.model.dtype", "did you mean 'bfloat16'?"),
    ("heads = 2", "heads = 3", "groups.0.model.shape.heads", "no multiple of heads 3", "shape ="),
    (
        "heads = 2", "heads = 4, kv_heads = 3", "groups.0.model.shape.kv_heads",
        "heads 4 is no multiple of kv_heads 3", "shape =",
    ),
    (
        '"bert", width = 8, layers = 2, heads = 2', '"gemma2", width = 9, layers = 2, heads = 3',
        "groups.0.model.shape.heads", "width 9 gives 3 heads an odd width each", "shape =",
    ),
    (
        '"bert", width', '"vit", image_size = 28, patch_size = 5, channels = 1, width',
        "groups.0.model.shape.patch_size", "image_size 28 is no multiple of patch_size 5", "shape =",
    ),
    ("train = 12", "trian = 12", "groups.0.task.trian", "did you mean 'train'?"),
    ("train = 12", "kind = 'classify'", "groups.0.task.kind", "did you mean 'classification'?"),
    (
        "train = 12", "partition = { kind = 'dirichlet' }", "groups.0.task.partition.alpha",
        "needs alpha",
    ),
    (
        "train = 12", "partition = { alpha = 0.5 }", "groups.0.task.partition.alpha",
        "belongs to partition 'dirichlet'",
    ),
    (
        "train = 12", "kind = 'causal_lm'\npartition = { kind = 'dirichlet', alpha = 1.0 }",
        "groups.0.task.partition", "causal_lm has none",
    ),
    ("train = 12", "split = 'train'", "groups.0.task.split", "belongs to data 'hub:...'"),
    ("batch_size = 4", "microbatches = 3", "groups.0.budget.microbatches", "no multiple"),
    ("batch_size = 4", "epochs = 1\nsteps = 2", "groups.0.budget.steps", "not both"),
    ("[log]", "[sampling]\nkind = 'unifrom'\n[log]", "sampling.kind", "'uniform'?", "kind ="),
    ("[log]", "[sampling]\nkind = 'uniform'\n[log]", "sampling.count", "needs one", "[sampling]"),
    ("[log]", "[sampling]\ncount = 2\n[log]", "sampling.count", "belongs to", "count ="),
    ("[log]", "[sampling]\nkind = 'schedule'\n[log]", "sampling.schedule", "a list", "[sampling]"),
    (
        "[log]", "[sampling]\nkind = 'schedule'\nschedule = [['wide/9']]\n[log]", "sampling.schedule",
        "round 0 names client 'wide/9'; allowed: narrow/0", "schedule =",
    ),
    (
        "batch_size = 8\n",
        "newcomers = { count = 1, steps = 1 }\n[sampling]\nkind = 'schedule'\n"
        "schedule = [['narrow/0'], ['wide/2']]\n",
        "sampling.schedule", "round 1 names client 'wide/2', a newcomer, who never takes part",
        "schedule =",
    ),
    ("[log]", "[schedule]\nwarmup = 3\n[log]", "schedule.warmup", "leave none of 3", "warmup ="),
    (
        "batch_size = 8\n", "every = 0\n[stop]\npatience = 1\n", "evaluation.every",
        "0 tests at the end alone, where [stop] has nothing left to stop", "every =",
    ),
    ("[log]", "[stop]\nmetric = 'acuracy'\n[log]", "stop.metric", "'accuracy'?", "metric ="),
    ("[log]", "[engine]\nclient_axis = 'sca'\n[log]", "engine.client_axis", "scan", "client_axis ="),
    ("[log]", "[engine]\nclient_axis = 0\n[log]", "engine.client_axis", "chunk", "client_axis ="),
    ("learning_rate", "learing_rate", "method.learing_rate", "'learning_rate'?", "learing_rate"),
    ("1e-2", "'fast'", "method.learning_rate", "must be a number, not 'fast'", "learning_rate"),
    ("1e-2", "-1", "method.learning_rate", "positive", "learning_rate"),
    ('"h2tune"', '"h2tun"', "method.name", "did you mean 'h2tune'?", 'name = "h2tun"'),
    ("lambda_norm = 1e-3", "selection = 'blok'", "method.selection", "did you mean 'block'?"),
    (
        "lambda_norm = 1e-3", "basis = 'anchored'\nselection = 'score'", "method.basis",
        "excludes selection", "basis =",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[1].replace("\n", " ") or case[2])
def test_refused_with_line_key_and_what_is_allowed(case):
    old, new, key, words, *start = case
    before, found, after = tiny_run.TOML.partition(old)
    assert found
    message = refusal(before + new + after)
    place = "run.toml"
    if start != [None]:
        begin = start[0] if start else new.splitlines()[-1]
        text = (before + new + after).splitlines()
        # What is named stands in the part that was changed, or heads it.
        last = len((before + new).splitlines())
        lines = [i for i, line in enumerate(text, 1) if line.startswith(begin)]
        nearby = [i for i in lines if i <= last] if begin.startswith("[") else lines
        place += f":{nearby[-1] if begin.startswith('[') else nearby[0]}"
    entries = [line for line in message.splitlines() if f": {key}: " in line]
    assert entries, message
    assert words in entries[0]
    if start != [None]:
        assert entries[0].startswith(f"{place}: {key}: ")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"vit"}))
def test_heads_of_odd_width_are_refused_where_positions_turn_pairs(family):
    sizes = {"family": family, "layers": 1, "heads": 2, "mlp_width": 8}
    model = config_from_hf(_hf_fields(settings.ShapeConfig(width=8, **sizes), ByteTokenizer()))
    refused = pytest.raises(ValueError, match="an odd width each")
    with contextlib.nullcontext() if model.rope_theta is None else refused:
        settings.ShapeConfig(width=6, **sizes)


def test_every_problem_is_reported():
    message = refusal(tiny_run.TOML.replace("rank = ", "rnk = "))
    lines = message.splitlines()
    assert len(lines) == 4
    assert sum("did you mean 'rank'?" in line for line in lines) == 2


def test_validation_split_needs_rows():
    text = tiny_run.TOML.replace("batch_size = 8", "split = 'validation'", 1)
    text = text.replace("validation = 6", "validation = 0", 1)
    message = refusal(text)
    assert "run.toml:30: groups.0.task.validation: evaluation.split is 'validation'" in message


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read: No such file"):
        load_config(tmp_path / "gone.toml")
    (tmp_path / "half.toml").write_text("rounds = 3\n[method\n")
    with pytest.raises(ConfigError, match=r"half\.toml:2: not TOML"):
        load_config(tmp_path / "half.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.toml")
    assert issubclass(ConfigError, FederationError)


def test_overrides(folder):
    read = lambda *overrides: load_config(folder / "tiny.toml", overrides)
    config = read("rounds=7", "groups.wide.rank=6", "groups.0.count=9", "name=other run")
    assert (config.rounds, config.name) == (7, "other run")
    assert (config.groups[1].rank, config.groups[0].count) == (6, 9)
    assert {group.rank for group in read("groups.*.rank=3").groups} == {3}
    # A table that is not there, and a key that is taken out.
    assert read("stop.patience=5").stop.patience == 5  # pyright: ignore
    assert read("groups.wide.targets=none").groups[1].targets is None
    # For a method's option "none" is a value.
    assert read("method.lambda_norm=none").method.options["lambda_norm"] == "none"
    assert read("sampling.schedule=[['wide/1'], ['narrow/0']]", "sampling.kind=schedule")


def test_method_rank_serves_groups_without_one():
    text = tiny_run.TOML.replace("rank = 2\n", "", 1)
    config = parse_config(text, ["method.rank=5"])
    assert [group.rank for group in config.groups] == [5, 4]
    assert "rank" not in config.method.options


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rounds", "expected key=value"),
        ("=3", "expected key=value"),
        ("rounds=x", "--set rounds=x: rounds: must be a whole number"),
        ("groups.wyde.rank=3", "no group is called 'wyde'; allowed: narrow, wide; did you mean 'wide'?"),
        ("seed.x=3", "seed: is no table"),
        ("sampling=4", "sampling: must be a table with kind, count, fraction, schedule, not 4"),
        ("groups.wide.model=minilm", "groups.1.model: must be a table with source"),
        ("groups.wide.rank=0", "--set groups.wide.rank=0: groups.1.rank"),
        ("method.alternation=both", "--set method.alternation=both: method.alternation"),
    ],
)  # fmt: skip
def test_bad_overrides_name_themselves(override, words):
    assert words in refusal(tiny_run.TOML, override)


def test_settings_from_python():
    data = tomllib.loads(tiny_run.TOML)
    assert isinstance(make_config(data), RunConfig)
    data["rounds"] = "3"
    with pytest.raises(ConfigError, match=r"^rounds: must be a whole number"):
        make_config(data)


def test_metric_follows_the_tasks():
    text = tiny_run.TOML.replace('data = "words.jsonl"', 'data = "x.jsonl"\nkind = "regression"')
    config = parse_config(text, ["stop.patience=2"])
    assert (config.checkpoints.metric, config.checkpoints.mode) == ("loss", "min")
    assert config.stop is not None
    assert (config.stop.metric, config.stop.mode) == ("loss", "min")
    assert "not what every group's task reports" in refusal(text, "checkpoints.metric=accuracy")


def test_a_loss_is_better_when_it_falls():
    config = parse_config(tiny_run.TOML, ["stop.metric=loss", "checkpoints.metric=loss"])
    assert config.stop is not None
    assert (config.stop.mode, config.checkpoints.mode) == ("min", "min")
    asked = parse_config(tiny_run.TOML, ["stop.metric=loss", "stop.mode=max"]).stop
    assert asked is not None
    assert asked.mode == "max"


def test_digest_sees_what_determines_results(folder):
    digest = lambda *overrides: config_digest(load_config(folder / "tiny.toml", overrides))
    same = digest()
    for override in ("name=y", "log.tensorboard=true", "checkpoints.keep_last=9"):
        assert digest(override) == same
    others = ("seed=4", "rounds=4", "method.learning_rate=2e-2", "groups.wide.task.train=9")
    changed = {digest(override) for override in others}
    assert len(changed | {same}) == 5


def test_paths_are_relative_to_the_file(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = tiny_run.TOML.replace('tokenizer = "bytes"', 'tokenizer = "sub/model.gguf"', 1)
    config = parse_config(text, folder=folder)
    assert config.groups[0].model.tokenizer == str(folder / "sub" / "model.gguf")
    assert config.groups[1].model.tokenizer == "bytes"


def test_every_key_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "run.md").read_text()
    code = set(re.findall(r"[A-Za-z0-9_]+", " ".join(re.findall(r"`[^`]*`", text))))
    models = [
        m
        for m in vars(settings).values()
        if isinstance(m, type) and issubclass(m, settings.Settings)
    ]
    missing = {f"{m.__name__}.{key}" for m in models for key in m.model_fields if key not in code}
    assert len(models) > 15
    assert not missing


# Where keys stand


def test_lines_of_keys():
    text = """# a comment with [brackets] and = signs
a = 1
"q.r" = [1, # inner ]
  2,
]
b.c = '''
[not.a.table]
x = 1
'''
[t] # comment
k = "a = \\"b\\" ["
[t.u]
v = { w = 1, x = [1, 2] }
[[m]]
n = 1
[[m]]
[m.o]
p = 2
[[m.z]]
y = 1
[[m.z]]
y = 2
"""
    lines = toml_text.locate_keys(text)
    assert tomllib.loads(text)["m"][1]["z"][1]["y"] == 2
    assert lines == {
        ("a",): 2, ("q.r",): 3, ("b",): 6, ("b", "c"): 6, ("t",): 10, ("t", "k"): 11,
        ("t", "u"): 12, ("t", "u", "v"): 13, ("m",): 14, ("m", 0): 14, ("m", 0, "n"): 15,
        ("m", 1): 16, ("m", 1, "o"): 17, ("m", 1, "o", "p"): 18, ("m", 1, "z"): 19,
        ("m", 1, "z", 0): 19, ("m", 1, "z", 0, "y"): 20, ("m", 1, "z", 1): 21,
        ("m", 1, "z", 1, "y"): 22,
    }  # fmt: skip


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
TABLES = st.recursive(
    st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
    lambda inner: st.dictionaries(
        st.text(max_size=5), VALUES | inner | st.lists(inner, min_size=1, max_size=2), max_size=3
    ),
    max_leaves=6,
)


@given(TABLES)
def test_written_toml_reads_back_and_every_key_is_found(table):
    text = toml_text.write_toml(table)
    assert tomllib.loads(text) == table
    lines = toml_text.locate_keys(text)
    rows = text.split("\n")

    def check(node, path):
        for key, value in node.items():
            here = (*path, key)
            assert here in lines
            if isinstance(value, dict):
                check(value, here)
            elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
                for i, entry in enumerate(value):
                    check(entry, (*here, i))
            else:
                assert rows[lines[here] - 1].split(" = ")[0].strip() == toml_text._write_key(key)

    check(table, ())

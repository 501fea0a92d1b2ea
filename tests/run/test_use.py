import dataclasses
import json
import shutil
import subprocess

import jax
import numpy as np
import pytest
from run_folders import fill, small_disk, write_run
from tiny_run import tiny_config

from h2tune_jax.models.load_hf import load_hf
from h2tune_jax.models.model import build
from h2tune_jax.run import write_checkpoint
from h2tune_jax.run.config import make_config, parse_config
from h2tune_jax.run.disk import Gone, RunError
from h2tune_jax.run.export import export_client
from h2tune_jax.run.folder import RunFolder, lock_folder
from h2tune_jax.run.loop import simulate
from h2tune_jax.run.rows import Location, Segments, index_array, index_from, layout_of
from h2tune_jax.run.use import open_client, open_run, open_with, predict, row_of
from h2tune_jax.types import FederationError

NATIVE = "groups.*.model.pooling=native"
CAUSAL = """
rounds = 1
[method]
name = "local"
learning_rate = 1e-2
[[groups]]
name = "writer"
rank = 2
[groups.model]
source = "random"
tokenizer = "bytes"
shape = { family = "llama", width = 8, layers = 1, heads = 2, mlp_width = 12, max_positions = 64 }
[groups.task]
data = "adds.jsonl"
kind = "causal_lm"
train = 8
test = 4
max_length = 24
prompt = "{question}="
answer = "{answer}"
[groups.budget]
batch_size = 4
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("use")
    settings = tiny_config(root, NATIVE, "rounds=2", "method.learning_rate=0.1").model_dump()
    settings["groups"] = settings["groups"][:1]
    simulate(make_config(settings), out=root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def run(folder):
    return open_run(folder)


def test_examples(run, cohort):
    data = run.federation.test[cohort]
    return {name: np.asarray(leaf)[0] for name, leaf in data.examples.items()}


test_examples.__test__ = False


def logits_of(run, name):
    """What the client says to its test rows, and the rows' labels."""
    client = open_client(run, name)
    rows = test_examples(run, client.cohort)
    model = run.federation.groups[client.cohort].model
    sites, head = client.adapters
    logits = jax.jit(model.classify_fn)(run.programs.bases[client.cohort], sites, head, rows)
    return np.asarray(logits), rows


def test_clients_are_those_that_were_recorded(run, folder):
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert run.rounds == 2
    recorded = last["evaluation"]["trained"]["narrow"]["accuracy"]
    assert len(recorded) == 2
    for client, expected in enumerate(recorded):
        logits, rows = logits_of(run, f"narrow/{client}")
        found = (logits.argmax(axis=1) == rows["labels"]).mean()
        assert found == pytest.approx(expected, abs=1e-6)


def test_predict_gives_the_label_of_the_logits(run, folder):
    logits, rows = logits_of(run, "narrow/1")
    labels = run.federation.groups[0].labels
    tokenizer = run.federation.groups[0].tokenizer
    for row in range(3):
        text = tokenizer.decode(rows["input_ids"][row][rows["attention_mask"][row]])
        assert predict(run, "narrow/1", text) == labels[logits[row].argmax()]
    assert predict(folder, "narrow/1", {"text": text}) == labels[logits[row].argmax()]
    assert predict(*open_with(run, "narrow/1"), text) == labels[logits[row].argmax()]


def test_merged_export_says_the_same(run, tmp_path):
    logits, rows = logits_of(run, "narrow/1")
    assert export_client(run, "narrow/1", "merged", tmp_path / "x") == tmp_path / "x"
    model, base = load_hf(tmp_path / "x")
    head = read_head(tmp_path / "x", model)
    found = jax.jit(model.classify_fn)(base, {}, head, rows)
    assert np.abs(logits).max() > 0.01
    np.testing.assert_allclose(found, logits, atol=2e-5)
    fields = json.loads((tmp_path / "x" / "config.json").read_text())
    assert fields["id2label"] == {"0": "beast", "1": "fruit", "2": "tool"}


def read_head(folder, model):
    from safetensors.numpy import load_file

    from h2tune_jax.models.families import family_of

    tensors = load_file(folder / "model.safetensors")
    return {
        name: {"w": tensors[f"{module}.weight"].T, "b": tensors[f"{module}.bias"]}
        for name, module in family_of(model.config).head.modules
    }


def test_arrays_export_has_all_that_was_trained(run, tmp_path):
    from safetensors import safe_open

    client = open_client(run, "narrow/0")
    export_client(run, "narrow/0", "adapter", tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", "numpy") as file:
        facts = json.loads(file.metadata()["h2tune"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert facts["client"] == "narrow/0"
    assert facts["labels"] == ["beast", "fruit", "tool"]
    assert facts["rounds"] == 2
    assert facts["sites"]["q"] == {
        "class": "SiteAdapter", "scale": 8.0, "residual": True, "dropout": 0.0, "kernels": "auto",
    }  # fmt: skip
    for kind, site in client.adapters.sites.items():
        for name in ("a", "core", "b"):
            np.testing.assert_array_equal(arrays.pop(f"sites.{kind}.{name}"), getattr(site, name))
    assert arrays
    assert all(name.startswith("head.") for name in arrays)


def test_default_folder_of_an_export(run, folder):
    assert export_client(run, "narrow/1", "adapter") == folder / "export" / "narrow-1-adapter"


def test_an_export_names_the_base_that_it_writes_where_that_lies(run, tmp_path):
    export_client(run, "narrow/1", "peft", tmp_path / "x")
    fields = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "x" / "base")
    assert (tmp_path / "x" / "base" / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("form", ["peft", "merged", "adapter"])
def test_an_export_that_the_disk_has_no_room_for_leaves_nothing(run, tmp_path, form):
    with small_disk(tmp_path / "disk", "1m"):
        mine = tmp_path / "disk" / "x" / "mine"
        mine.parent.mkdir()
        mine.write_text("mine")
        fill(tmp_path / "disk" / "somebody else's")
        for out in (mine.parent, tmp_path / "disk" / "new"):
            with pytest.raises(
                RunError,
                match=r"the export cannot be written to .*: No space left .*make room and export",
            ):
                export_client(run, "narrow/1", form, out)
            left = sorted(path.name for path in (tmp_path / "disk").rglob("*"))
            assert left == ["mine", "somebody else's", "x"]


def test_an_export_to_a_read_only_disk_is_said(run, tmp_path):
    with small_disk(tmp_path / "disk", "1m"):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(
            RunError, match=r"the export cannot be written to .*: Read-only file system; choose"
        ):
            export_client(run, "narrow/1", "adapter", tmp_path / "disk" / "x")


@pytest.mark.slow
def test_peft_export_says_the_same_in_torch(run, tmp_path):
    torch_models = pytest.importorskip("torch_models", reason="the extra `parity` is not installed")
    import transformers

    logits, rows = logits_of(run, "narrow/1")
    export_client(run, "narrow/1", "peft", tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        fields["base_model_name_or_path"], num_labels=3
    )
    loaded = torch_models.load_peft(base, tmp_path)
    batch = {name: rows[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    torch_models.assert_same(logits, torch_models.run_torch(loaded, batch))


def test_every_store_holds_the_same_clients(folder, tmp_path):
    """One of three clients trains; the other two start when they are asked for."""
    found = []
    for kind in ("device", "file"):
        settings = tiny_config(
            folder.parent,
            "rounds=1",
            "sampling.kind=uniform",
            "sampling.count=1",
            f"store.kind={kind}",
        ).model_dump()
        settings |= {"method": {"name": "local"}, "groups": settings["groups"][1:]}
        simulate(make_config(settings), out=tmp_path / kind)
        run = open_run(tmp_path / kind)
        found.append([open_client(run, f"wide/{i}").adapters for i in range(3)])
    jax.tree.map(np.testing.assert_array_equal, *found)
    moved = [bool(np.asarray(one.sites["q"].b).any()) for one in found[0]]
    assert sum(moved) == 1

    # A run under way: what was read is gone by now, and its rows lie elsewhere.
    paths, trained = RunFolder(tmp_path / "file"), moved.index(True)
    layout = layout_of(run.programs.client_shapes(run.server)[0])
    segments = Segments(paths.clients, 0, layout.row_bytes)
    place = index_from(run.arrays[".index[0]"])[trained]
    number = segments.write([np.array(row) for _, row in segments.read([(0, place)])])
    arrays = {**run.arrays, ".index[0]": index_array({trained: Location(number, 0)})}
    beside = {segments.name(number): segments.marks[number]}
    write_checkpoint.save(paths, 2, arrays, run.meta, beside)
    write_checkpoint.prune(paths, [2])
    segments.keep(set(beside))
    with pytest.raises(Gone, match="no longer there: its run has gone on"):
        open_client(run, f"wide/{trained}")
    again, client = open_with(run, f"wide/{trained}")
    assert again.rounds == 2
    jax.tree.map(np.testing.assert_array_equal, client.adapters, found[1][trained])


def test_a_damaged_checkpoint_is_passed_over(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "000002" / "manifest.json").write_text("")
    run = open_run(tmp_path / "run")
    assert run.rounds == 1
    (notice,) = run.notices
    assert notice.startswith("the checkpoint of round 2 does not verify (manifest.json cannot be")
    assert notice.endswith("; this is round 1")


def test_a_run_under_way_is_said_to_be(folder, run):
    assert run.notices == ()
    with lock_folder(RunFolder(folder)):
        (notice,) = open_run(folder).notices
    assert notice == "the run is under way: this is what it held after round 2"


def test_a_changed_config_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("seed = 3", "seed = 4"))
    with pytest.raises(FederationError, match="was changed after the run began"):
        open_run(tmp_path / "run")


def test_what_cannot_be_exported(run, tmp_path):
    with pytest.raises(FederationError, match=r"no client is called 'narrow/9'.*did you mean"):
        export_client(run, "narrow/9")
    with pytest.raises(FederationError, match="'pdf' is unknown; allowed: peft, merged, adapter"):
        export_client(run, "narrow/0", "pdf")
    facts = run.federation.groups[0]
    mean = build(dataclasses.replace(facts.model.config, pooling="mean"))
    groups = (facts._replace(model=mean), *run.federation.groups[1:])
    pooled = run._replace(federation=run.federation._replace(groups=groups))
    for form in ("peft", "merged"):
        with pytest.raises(
            FederationError, match=r"pooling 'mean' is ours alone.*Format 'adapter'"
        ):
            export_client(pooled, "narrow/0", form, tmp_path / form)
        assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_no_run(tmp_path):
    with pytest.raises(FederationError, match="holds no run"):
        open_run(tmp_path)
    written = write_run(tmp_path / "run")
    with pytest.raises(FederationError):
        open_run(written)


def test_completion(tmp_path):
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(40)]
    (tmp_path / "adds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    simulate(parse_config(CAUSAL, folder=tmp_path), out=tmp_path / "run")
    run = open_run(tmp_path / "run")
    answer = predict(run, "writer/0", "3+3", max_new_tokens=4)
    assert isinstance(answer, str)
    assert len(answer.encode()) <= 12  # four bytes, each at most a replacement character
    client = open_client(run, "writer/0")
    # Greedy: the first byte is the likeliest behind the prompt.
    facts = run.federation.groups[0]
    ids = np.asarray(facts.tokenizer(["3+3="])["input_ids"], np.int32)
    logits = facts.model.logits_fn(run.programs.bases[0], client.adapters.sites, {"input_ids": ids})
    first = int(np.asarray(logits)[0, -1].argmax())
    expected = facts.tokenizer.decode([first])
    assert answer.startswith(expected.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_rows_of_a_task(run):
    task = run.config.groups[0].task
    assert row_of(task, "x") == {"text": "x"}
    pair = task.model_copy(update={"text": "{premise}", "pair": "{hypothesis}"})
    with pytest.raises(FederationError, match="reads the fields hypothesis, premise; give a row"):
        row_of(pair, "x")
    assert row_of(pair, {"premise": "a", "hypothesis": "b"})["premise"] == "a"

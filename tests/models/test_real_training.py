"""Training of real weights on real questions: against torch and peft, to a known accuracy, federated."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import h2tune_jax as h2
from h2tune_jax import tasks
from h2tune_jax.models import load_tokenizer, prune_depth
from h2tune_jax.tasks import assets, corpora

torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
peft = pytest.importorskip("peft", reason="the extra `parity` is not installed")
torch.set_num_threads(1)
TREC = corpora.LABELS["trec"]
SARCASM = corpora.LABELS["sarcasm"]
SEED = jnp.int32(0)


def load_rows(load_fn):
    try:
        return load_fn()
    except assets.AssetUnavailable as error:
        pytest.skip(f"asset: {error}")


@pytest.fixture(scope="session")
def tokenizer(minilm):
    return load_tokenizer(minilm)


@pytest.fixture(scope="session")
def questions():
    return load_rows(corpora.load_trec)


def encode(rows, tokenizer, names, max_length):
    examples = tasks.encode_texts(rows, tokenizer, max_length=max_length).examples
    return examples | {"labels": tasks.encode_labels(rows, names)}


def make_cohort(name, model, num_labels, **fields):
    return h2.CohortSpec(
        name=name,
        model=model.spec,
        loss_fn=tasks.make_loss_fn(tasks.forward_of(model, "classification"), "classification"),
        init_head_fn=model.init_head_fn(num_labels),
        **fields,
    )


STEPS, BATCH, RANK, ALPHA = 20, 16, 8, 16.0
RATE, HEAD_RATE, DECAY = 2e-3, 1e-2, 0.1
MODULES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}


def torch_losses(folder, params, batches):
    """Losses of the steps of torch and peft from our initial factors and head, and without steps."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(TREC),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(MODULES.values()),
        modules_to_save=["classifier"],
    )
    with warnings.catch_warnings():
        # peft's own use of a deprecated name in transformers
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = peft.get_peft_model(model, lora).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    written = {}
    for kind, module in MODULES.items():
        for i in range(model.config.num_hidden_layers):
            place = f"base_model.model.bert.encoder.layer.{i}.{module}"
            written[f"{place}.lora_A.default.weight"] = params["a"][kind][i].T
            written[f"{place}.lora_B.default.weight"] = params["b"][kind][i].T
    head = "base_model.model.classifier.modules_to_save.default"
    written[f"{head}.weight"] = params["head"]["out"]["w"].T
    written[f"{head}.bias"] = params["head"]["out"]["b"]
    assert set(written) == set(trained)  # peft trains exactly what we train
    with torch.no_grad():
        for name, array in written.items():
            trained[name].copy_(torch.tensor(np.array(array)))
    split = lambda is_head: [p for name, p in trained.items() if name.startswith(head) == is_head]
    optimizer = torch.optim.AdamW(
        [{"params": split(False), "lr": RATE}, {"params": split(True), "lr": HEAD_RATE}],
        weight_decay=DECAY,
    )
    names = "input_ids", "attention_mask", "labels"
    inputs = [{name: torch.tensor(batch[name]).long() for name in names} for batch in batches]
    with torch.no_grad():
        untrained = [model(**batch).loss.item() for batch in inputs]
    losses = []
    for batch in inputs:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), np.array(untrained)


@pytest.mark.slow
def test_loss_curve_equals_that_of_peft(minilm, minilm_model, tokenizer, questions):
    model, base = minilm_model
    examples = encode(questions[: STEPS * BATCH], tokenizer, TREC, 32)
    batches = [
        tasks.take_rows(examples, np.arange(i * BATCH, (i + 1) * BATCH)) for i in range(STEPS)
    ]
    # One step a round, on data that hold one batch: so every step's loss can be seen.
    budget = h2.Budget(batch_size=BATCH, steps=1, shuffle=False)
    spec = make_cohort(
        "trec", model, len(TREC), num_clients=1, rank=RANK, alpha=ALPHA, budget=budget
    )
    method = h2.local(
        learning_rate=RATE, head_rate=HEAD_RATE, weight_decay=DECAY, optimizer_state="kept"
    )
    state = h2.init_round(method, (spec,), (base,), None, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.array(leaf[0]), state.clients[0].params)
    round_fn = h2.make_round(method, (spec,))
    ours = []
    for batch in batches:
        data = (tasks.stack_clients([batch]),)
        args = (base,), data, (None,), (None,), method.hyper, SEED
        state, metrics = round_fn(state, *args)
        ours.append(float(metrics.clients["trec"]["loss"][0]))
    theirs, untrained = torch_losses(minilm, params, batches)
    gap = np.abs(np.array(ours) - theirs)
    print(f"losses {np.round(theirs, 4).tolist()}, largest difference {gap.max():.1e}")
    assert (untrained - theirs)[-5:].mean() > 0.1  # it learns: to stand still would not do
    assert gap.max() < 1e-3


@pytest.mark.slow
def test_lora_reaches_a_known_accuracy(minilm_model, tokenizer, questions):
    """All of TREC but 500 test questions, 3 epochs, the pooling and head of BERT's own classifier."""
    model, base = minilm_model
    # Chosen on 1,000 validation questions, with 3,881 to train on and the test questions left out:
    # batch 16 at 1e-3 (0.943) before batch 32 at 2e-3 (0.933; by mean pooling 0.936). On 500 of them
    # batch 32 reached 0.934, 0.944 and 0.916 at 1e-3, 2e-3 and 4e-3. The rest was set once.
    # 24 tokens cut 131 of 5,381 questions.
    examples = encode(questions, tokenizer, TREC, 24)
    sizes = {"test": 500, "train": None}
    splits = tasks.split_rows(questions, sizes, seed=0, by=lambda row: row["text"])
    assert len(splits["train"]) == 4881
    budget = h2.Budget(batch_size=16, epochs=3)
    spec = make_cohort("trec", model, len(TREC), num_clients=1, rank=16, budget=budget)
    method = h2.local(
        learning_rate=1e-3,
        head_rate=5e-3,
        weight_decay=0.01,
        schedule=h2.cosine_schedule(warmup=0.1),
    )
    data, test = ((tasks.make_clients(examples, [splits[name]]),) for name in ("train", "test"))
    evaluate = h2.make_evaluate(method, (spec,), batch_size=100)
    state = h2.init_round(method, (spec,), (base,), None, jax.random.key(0))
    before = float(evaluate(state, (base,), test)["trec"]["accuracy"][0])
    args = state, (base,), data, (None,), (None,), method.hyper, SEED
    # The tests compile without optimising; here that would cost more than it saves.
    optimised = {"xla_backend_optimization_level": 3}
    round_fn = h2.make_round(method, (spec,)).lower(*args).compile(compiler_options=optimised)
    state, metrics = round_fn(*args)
    assert metrics.clients["trec"]["steps"][0] == 3 * 306
    after = float(evaluate(state, (base,), test)["trec"]["accuracy"][0])
    print(f"LoRA of MiniLM on TREC: test accuracy {before:.3f} before, {after:.3f} after 3 epochs")
    assert before < 0.5
    assert after >= 0.92


PUBLIC = 64  # texts of the probe


@pytest.mark.slow
def test_h2tune_over_two_depths(minilm_model, tokenizer, questions):
    model, base = minilm_model
    small, small_base = prune_depth(model, base, every=2)
    assert small.spec.num_layers == 3
    headlines = load_rows(corpora.load_sarcasm)
    public = load_rows(corpora.load_rotten_tomatoes)[:PUBLIC]
    texts = tasks.encode_texts(public, tokenizer, max_length=24).examples
    texts = {name: jnp.asarray(texts[name]) for name in ("input_ids", "attention_mask")}

    fields = {"num_clients": 2, "budget": h2.Budget(batch_size=8, steps=2)}
    specs = (
        make_cohort("trec", model, len(TREC), rank=8, **fields),
        make_cohort("sarcasm", small, len(SARCASM), rank=4, **fields),
    )
    clients = lambda rows, names: tasks.make_clients(
        encode(rows, tokenizer, names, 24), [np.arange(8), np.arange(8, 16)]
    )
    data = clients(questions[:16], TREC), clients(headlines[:16], SARCASM)
    bases, probe = (base, small_base), (texts, texts)
    method = h2.h2tune(basis="anchored", relation="cka", learning_rate=1e-3, head_rate=1e-2)
    state = h2.init_round(method, specs, bases, probe, jax.random.key(0))

    whole, pruned = (state.server.starts[spec.name] for spec in specs)
    # The same first layer: it speaks to the first slot.
    assert np.argmax(whole.relation, axis=0).tolist() == list(range(6))
    assert np.argmax(pruned.relation[:, 0]) == 0
    for kind in specs[1].kinds:
        fit = np.asarray(pruned.fit[kind][0])
        assert ((fit > 0.5) & (fit <= 1.0001)).all(), (kind, fit)

    before = np.asarray(state.server.middle)
    round_fn = h2.make_round(method, specs, donate=False)
    for _ in range(2):  # a warm start, then a round that alternates
        args = bases, data, (None, None), (None, None), method.hyper, SEED
        state, metrics = round_fn(state, *args)
        for spec in specs:
            assert np.isfinite(metrics.clients[spec.name]["loss"]).all()
            assert metrics.clients[spec.name]["finite"].all()
            assert metrics.rejected[spec.name] == 0
        after = np.asarray(state.server.middle)
        assert np.isfinite(after).all()
        assert (after != before).any(axis=(1, 2, 3)).all()  # in every slot
        before = after

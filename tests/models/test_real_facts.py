"""What is known of the real models shows in ours: meaning, fluency, features that a line can read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from h2tune_jax import Adapters, tasks
from h2tune_jax.models import load_gguf_tokenizer, load_tokenizer
from h2tune_jax.tasks import assets, corpora


def embed_texts(model, base, tokenizer, texts, *, max_length=32, batch_size=100):
    """Mean-pooled states of the last layer, f32[n, d], as sentence-transformers has them."""
    rows = [{"text": text} for text in texts]
    examples = tasks.encode_texts(rows, tokenizer, max_length=max_length).examples

    @jax.jit
    def embed(batch):
        hidden = model.hidden_fn(base, None, batch)
        weight = batch["attention_mask"].astype(jnp.float32)[..., None]
        return (hidden * weight).sum(axis=1) / weight.sum(axis=1)

    # Texts of like length go together, padded to few widths: half the tokens would be padding.
    order = np.argsort(examples["lengths"], kind="stable")
    features = np.empty((len(texts), model.config.width), np.float32)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        width = min(-(-int(examples["lengths"][index].max()) // 8) * 8, max_length)
        batch = {
            name: jnp.asarray(examples[name][index, :width])
            for name in ("input_ids", "attention_mask")
        }
        features[index] = np.asarray(embed(batch))
    return features


PARAPHRASES = [
    ("How do I get my money back?", "What is the way to obtain a refund?"),
    ("The child fell asleep on the sofa.", "A kid dozed off on the couch."),
    ("Heavy rain flooded the village last night.", "The town was under water after a storm."),
    ("She repairs old bicycles for a living.", "Her job is fixing used bikes."),
    ("The doctor told him to stop smoking.", "His physician advised him to give up cigarettes."),
]


def test_minilm_cosine_of_paraphrases(minilm, minilm_model):
    texts = [text for pair in zip(*PARAPHRASES) for text in pair]
    features = embed_texts(*minilm_model, load_tokenizer(minilm), texts)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit[: len(PARAPHRASES)] @ unit[len(PARAPHRASES) :].T
    same = np.diagonal(cosines)
    other = cosines[~np.eye(len(PARAPHRASES), dtype=bool)]
    print(f"paraphrases {np.round(same, 3)}, unrelated {np.round(np.sort(other)[::-1][:5], 3)} ...")
    assert same.min() > other.max() + 0.2
    assert same.mean() > other.mean() + 0.5


ENGLISH = [
    "The old man walked slowly along the beach every morning before breakfast, and his dog ran ahead "
    "of him to chase the birds that were resting on the sand.",
    "When water is heated to its boiling point, it turns into steam, which rises into the air and "
    "cools down until it becomes small drops of water again.",
    "My sister bought a new car last week because the engine of her old one had stopped working, "
    "and the repair would have cost more than the car was worth.",
    "The city decided to build a new library near the park, so that children could read there after "
    "school while their parents were still at work.",
]


def test_smollm2_perplexity_of_shuffled_words(smollm2, smollm2_model):
    model, base = smollm2_model
    rng = np.random.default_rng(0)
    shuffled = [" ".join(rng.permutation(text.split())) for text in ENGLISH]
    tokenizer = load_gguf_tokenizer(smollm2)
    evaluate = jax.jit(
        tasks.make_evaluate_fn(tasks.forward_of(model, "causal_lm"), "causal_lm", batch_size=2)
    )

    def perplexity(texts):
        rows = [{"text": text} for text in texts]
        encoded = tasks.encode_texts(rows, tokenizer, max_length=48)
        assert encoded.num_truncated == 0
        examples = jax.tree.map(jnp.asarray, encoded.examples)
        examples["answer_mask"] = examples["attention_mask"]
        adapters = Adapters({}, None)
        return float(evaluate(adapters, base, examples, jnp.int32(len(texts)))["perplexity"])

    english, noise = perplexity(ENGLISH), perplexity(shuffled)
    print(f"perplexity {english:.1f}, of the same words shuffled {noise:.1f}")
    assert english < 40
    assert english < noise / 10


def fit_logistic(features, labels, num_classes, *, decay):
    """Softmax regression by L-BFGS: -> (weights [d, V], bias [V])."""
    onehot = np.eye(num_classes)[labels]

    def objective(flat):
        w = flat.reshape(-1, num_classes)
        logits = features @ w[:-1] + w[-1]
        logits -= logits.max(axis=1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        error = (np.exp(log_probs) - onehot) / len(labels)
        gradient = np.vstack([features.T @ error + decay * w[:-1], error.sum(axis=0)])
        loss = -(onehot * log_probs).sum() / len(labels) + decay / 2 * (w[:-1] ** 2).sum()
        return loss, gradient.ravel()

    start = np.zeros((features.shape[1] + 1) * num_classes)
    found = scipy.optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 300}
    )
    w = found.x.reshape(-1, num_classes)
    return w[:-1], w[-1]


@pytest.fixture
def questions():
    try:
        return corpora.load_trec()
    except assets.AssetUnavailable as error:
        pytest.skip(f"asset trec: {error}")


@pytest.mark.slow
def test_linear_probe_on_trec(minilm, minilm_model, questions):
    names = corpora.LABELS["trec"]
    sizes = {"test": 1000, "train": 2400, "rest": None}
    splits = tasks.split_rows(questions, sizes, seed=0, by=lambda row: row["text"])
    train, test = ([questions[i] for i in splits[name]] for name in ("train", "test"))
    texts = [row["text"] for row in train + test]
    assert len(set(texts)) == len(texts)  # no question is in both
    features = embed_texts(*minilm_model, load_tokenizer(minilm), texts).astype(np.float64)
    features -= features[: len(train)].mean(axis=0)
    features /= features[: len(train)].std()  # one scale for all: two features of MiniLM are dead
    # The decay did best of 0.001 ... 1 on the last 400 of the training questions.
    w, b = fit_logistic(
        features[: len(train)], tasks.encode_labels(train, names), len(names), decay=0.03
    )
    labels = tasks.encode_labels(test, names)
    accuracy = float(((features[len(train) :] @ w + b).argmax(axis=1) == labels).mean())
    chance = float(np.bincount(labels).max() / len(labels))
    print(f"linear probe on TREC: {accuracy:.3f} of {len(labels)}, the largest class {chance:.3f}")
    assert accuracy >= 0.78

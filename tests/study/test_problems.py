"""The problems are what they say they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import h2tune_jax as h2
from h2tune_jax.adapters.site import SiteAdapter
from h2tune_jax.study.problems import partial, sensing, transformer
from h2tune_jax.study.problems.partial import HEAD
from h2tune_jax.study.problems.sensing import distance
from h2tune_jax.study.problems.transformer import encode_words
from h2tune_jax.tasks import corpora


def as_site(delta):
    """A SiteAdapter [Li, ...] whose adapted product of a zero weight is `delta`."""
    eye = jnp.broadcast_to(jnp.eye(delta.shape[-1]), delta.shape)
    return SiteAdapter(a=eye, core=None, b=jnp.asarray(delta, jnp.float32), scale=1.0)


def batch_of(data, client):
    take = lambda leaf: leaf[client]
    rows = jax.tree.map(take, data.examples)
    count = jax.tree.leaves(rows)[0].shape[0]
    return h2.Batch(rows, jnp.arange(count) < data.num_examples[client])


def test_sensing_has_its_solution():
    problem = sensing(noise=0.0, heterogeneity=0.0)
    assert problem.minimum == 0.0
    for spec, data, solution in zip(problem.specs, problem.data, problem.solution):
        # Of the client's own rank, and of norm 1.
        values = np.linalg.svd(solution, compute_uv=False)
        assert (values[..., spec.rank :] < 1e-12).all()
        np.testing.assert_allclose((values**2).sum(axis=-1), 1, rtol=1e-10)
        for client in range(spec.num_clients):
            loss = lambda delta, c=client, s=spec, d=data: s.loss_fn(
                h2.Adapters({"q": as_site(delta)}, None), (), batch_of(d, c), None
            )[0]
            found, grad = jax.value_and_grad(loss)(jnp.asarray(solution[client], jnp.float32))
            np.testing.assert_allclose(found, 0, atol=1e-10)
            np.testing.assert_allclose(grad, 0, atol=1e-5)
    away = tuple(
        h2.Adapters({"q": jax.vmap(as_site)(2 * solution)}, None) for solution in problem.solution
    )
    np.testing.assert_allclose(distance(problem, away), 1, rtol=1e-5)


def test_sensing_by_hand():
    problem = sensing(measurements=8)
    spec, data = problem.specs[1], problem.data[1]
    delta = np.random.default_rng(0).normal(size=(1, 6, 6))
    loss, _ = spec.loss_fn(h2.Adapters({"q": as_site(delta)}, None), (), batch_of(data, 2), None)
    x, y = (np.asarray(data.examples[name][2], float) for name in "xy")
    seen = (x[:, 0] * delta).sum(axis=(1, 2))
    np.testing.assert_allclose(loss, 0.5 * np.mean((seen - y[:, 0]) ** 2), rtol=1e-5)


def test_partial_is_a_quadratic_of_the_deltas_and_the_head():
    problem = partial(sigma=1.0)
    spec, data = problem.specs[0], problem.data[0]
    rng = np.random.default_rng(1)

    def loss(delta, head, key=None):
        adapters = h2.Adapters({"q": as_site(delta)}, head)
        return spec.loss_fn(adapters, (), batch_of(data, 1), key)[0]

    delta = jnp.asarray(rng.normal(size=(2, 4, 4)), jnp.float32)
    head = jnp.asarray(rng.normal(size=HEAD), jnp.float32)
    own = {name: np.asarray(leaf[1, 0], float) for name, leaf in data.examples.items()}
    told = own["coupling"] @ np.asarray(delta, float).mean(axis=0).ravel()
    expected = 0.5 * (own["curvature"] * (np.asarray(delta) - own["target"]) ** 2).sum()
    expected += 0.5 * ((np.asarray(head) + told - own["centre"]) ** 2).sum()
    np.testing.assert_allclose(loss(delta, head), expected, rtol=1e-5)
    assert own["curvature"].min() >= 0.3
    assert own["curvature"].max() <= 1.0
    # The noise of a step is linear: it changes the gradient by the same everywhere, sigma^2 on average.
    noise = jax.jit(
        jax.vmap(
            lambda key, delta, head: jax.grad(
                lambda d, h: loss(d, h, key) - loss(d, h), argnums=(0, 1)
            )(delta, head),
            in_axes=(0, None, None),
        )
    )
    keys = jax.random.split(jax.random.key(0), 2000)
    here, there = noise(keys, delta, head), noise(keys, 0 * delta, 0 * head)
    for a, b in zip(here, there):
        np.testing.assert_allclose(a, b, atol=1e-4)
    squares = sum(np.square(part).sum() for part in here) / 2000
    np.testing.assert_allclose(squares, 1.0, rtol=0.05)


def test_heterogeneity_is_the_distance_from_the_common_target():
    for problem, size in ((partial(heterogeneity=0.0), 0.0), (partial(heterogeneity=2.0), 2.0)):
        targets = np.asarray(problem.data[0].examples["target"])[:, 0]
        off = targets - targets.mean(axis=0)
        spread = np.sqrt((off**2).sum(axis=(1, 2, 3)).mean())
        assert spread <= size + 1e-5
        assert (spread > 0.5) == (size > 0)


def test_words_are_numbered_by_how_often_they_occur():
    encoded = encode_words(["Why is the sky blue ?", "the is the"], 4)
    # 0 pads, 1 begins; "the" 3 times, "is" twice, then the alphabet: "?", "blue", "sky", "why".
    np.testing.assert_array_equal(encoded["input_ids"], [[1, 7, 3, 2], [1, 2, 3, 2]])
    np.testing.assert_array_equal(encoded["attention_mask"], np.ones((2, 4)))
    short = encode_words(["a"], 4)
    np.testing.assert_array_equal(short["input_ids"], [[1, 2, 0, 0]])
    np.testing.assert_array_equal(short["attention_mask"], [[1, 1, 0, 0]])


@pytest.fixture
def questions(monkeypatch):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    names = corpora.LABELS["trec"]
    rows = [
        {"text": " ".join(rng.choice(words, 5)) + f" {i}", "label": names[i % 6]}
        for i in range(300)
    ]
    monkeypatch.setattr(corpora, "load_trec", lambda: rows)


def test_transformer_on_questions(questions):
    problem = transformer(num_clients=4, examples=8, width=16, length=6)
    assert [spec.rank for spec in problem.specs] == [2, 4]
    for spec, base, data in zip(problem.specs, problem.bases, problem.data):
        assert spec.model.num_layers == 2
        assert data.num_examples.tolist() == [8, 8]
        labels = np.asarray(data.examples["labels"])
        assert labels.shape == (2, 8)
        head = spec.init_head_fn(jax.random.key(0))
        loss, metrics = spec.loss_fn(h2.Adapters({}, head), base, batch_of(data, 0), None)
        np.testing.assert_allclose(loss, np.log(6), atol=0.4)
        assert metrics["logits"].shape == (8, 6)
    again = transformer(num_clients=4, examples=8, width=16, length=6)
    jax.tree.map(np.testing.assert_array_equal, problem.data, again.data)
    jax.tree.map(np.testing.assert_array_equal, problem.bases, again.bases)


def test_heterogeneity_of_the_transformer_is_in_the_labels(questions):
    counts = {}
    for zeta in (0.0, 5.0):
        problem = transformer(num_clients=4, examples=18, width=16, length=6, heterogeneity=zeta)
        labels = np.concatenate([np.asarray(d.examples["labels"]) for d in problem.data])
        counts[zeta] = np.mean([np.bincount(row, minlength=6).max() for row in labels])
    assert counts[5.0] > counts[0.0] + 2


def test_problems_do_not_depend_on_what_was_drawn_before():
    np.testing.assert_array_equal(sensing().solution[0], sensing().solution[0])
    assert np.any(sensing(seed=1).solution[0] != sensing().solution[0])


@pytest.mark.slow
def test_h2tune_finds_the_solution_of_sensing():
    problem = sensing(noise=0.0, heterogeneity=0.0, num_clients=4)
    method = h2.h2tune(
        core="pure",
        shared_rank=4,
        selection="score_frozen",
        warmup_rounds=0,
        lambda_norm=None,
        lambda_keep=None,
        lambda_distil=None,
    )
    round_fn = h2.make_round(method, problem.specs, client_axis="vmap")
    state = h2.init_round(method, problem.specs, problem.bases, None, jax.random.key(0))
    for index in range(600):
        rate = 0.02 * (1 - index / 600)
        hyper = method.hyper._replace(learning_rate=rate, shared_rate=rate)
        state, _ = round_fn(state, problem.bases, problem.data, None, None, hyper, np.uint32(0))
    adapters = tuple(
        jax.vmap(lambda one, s=spec: method.adapters(s, state.server, one, None))(clients)
        for spec, clients in zip(problem.specs, state.clients)
    )
    found = distance(problem, adapters)
    assert np.median(found) < 0.05
    assert found.max() < 0.2

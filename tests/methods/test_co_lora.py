"""Co-LoRA: gated sites, the fit of the frozen factors, and who hears whom, against plain accounts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.adapters.gated import Branch, GatedSite
from h2tune_jax.aggregate import architecture, note_latest
from h2tune_jax.methods.co_lora.align import aligned_layers, fit_factors
from h2tune_jax.methods.co_lora.state import (
    CoLoraServer,
    CoLoraUpload,
    hear,
    similarity,
    sketch,
)
from h2tune_jax.methods.latest import Latest


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def f32(array):
    return jnp.asarray(array, jnp.float32)


def make_specs(**changes):
    return tuple(dataclasses.replace(spec, rank=2, **changes) for spec in toy.make_specs())


def test_a_gated_site_token_by_token():
    shapes = {"a": (5, 2), "p": (2, 2), "q": (2,), "b": (2, 3)}
    local, shared = (
        {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
        for seed in (0, 10)
    )
    x, w, gate = draw(20, 4, 5), draw(21, 5, 3), draw(22, 3)
    branch = lambda parts: Branch(**{name: f32(leaf) for name, leaf in parts.items()})
    site = GatedSite(local=branch(local), shared=branch(shared), gate=f32(gate), scale=1.5)
    expected = []
    for token in x:
        share = 1 / (1 + np.exp(-(token @ local["a"] @ gate[:2] + gate[2])))
        sides = [((token @ v["a"]) @ v["p"] + v["q"]) @ v["b"] for v in (local, shared)]
        expected.append(token @ w + 1.5 * ((1 - share) * sides[0] + share * sides[1]))
    np.testing.assert_allclose(h2.adapted(f32(x), f32(w), site), expected, rtol=1e-4, atol=1e-5)
    dropping = dataclasses.replace(site, dropout=0.5)
    np.testing.assert_array_equal(dropping.update(f32(x)), site.update(f32(x)))
    assert np.abs(dropping.update(f32(x), jax.random.key(0)) - site.update(f32(x))).max() > 0.01


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"),
    [(6, 3, [1, 3, 5]), (7, 3, [2, 4, 6]), (4, 4, [0, 1, 2, 3]), (5, 1, [4])],
)
def test_layers_meet_at_the_ends_of_blocks(layers, blocks, expected):
    np.testing.assert_array_equal(aligned_layers(layers, blocks), expected)


def test_a_rotated_model_gets_factors_in_the_same_coordinates():
    # The second model is the first with its width embedded in a larger one by an orthonormal map.
    inputs, outputs = draw(0, 3, 200, 6), draw(1, 3, 200, 6)
    wider = np.linalg.qr(draw(2, 9, 6))[0].T
    activations = {"small": lambda base, texts: {"q": (f32(inputs), f32(outputs))}}
    activations["large"] = lambda base, texts: {"q": (f32(inputs @ wider), f32(outputs @ wider))}
    specs = tuple(
        dataclasses.replace(
            toy.cohort(name, width=width, depth=3, rank=2, kinds=("q",), classes=2, num_clients=1),
            model=h2.ModelSpec(
                num_layers=3, sites={"q": (width, width)}, site_activations_fn=activations[name]
            ),
        )
        for name, width in (("small", 6), ("large", 9))
    )
    small, large = fit_factors(specs, jax.random.key(0), (None, None), (None, None), 2).values()
    for block, layer in enumerate(aligned_layers(3, 2)):
        a, b = small["a"]["q"][block], small["b"]["q"][block]
        np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-5)
        seen = inputs[layer] @ wider @ large["a"]["q"][block]
        np.testing.assert_allclose(seen, inputs[layer] @ a, atol=0.1)
        np.testing.assert_allclose(large["b"]["q"][block] @ wider.T, b, atol=0.1)


def server_of(specs, seed=0):
    """A server that has heard all but one client, in numpy."""
    rng = np.random.default_rng(seed)
    parts, sketches, weights = [], [], []
    for spec in specs:
        count, others = spec.num_clients, spec.model.num_layers - 1
        own = {"p": {}, "q": {}, "a": {}, "b": {}}
        for kind in spec.kinds:
            d, f = spec.model.shapes[kind]
            shapes = {"p": (1, 2, 2), "q": (1, 2), "a": (others, d, 2), "b": (others, 2, f)}
            for name, shape in shapes.items():
                own[name][kind] = rng.normal(size=(count, *shape)).astype(np.float32)
        sketches.append({k: rng.normal(size=(count, 3)).astype(np.float32) + 1 for k in spec.kinds})
        weights.append(rng.uniform(0.5, 2, count).astype(np.float32))
        parts.append(own)
    weights[0][2] = 0.0
    for rows in sketches[0].values():
        rows[2] = 0.0
    start = lambda own: jax.tree.map(lambda rows: 7 + 0 * rows[0], {n: own[n] for n in "ab"})
    frozen = {architecture(spec): {"start": start(own)} for spec, own in zip(specs, parts)}
    sent = (CoLoraUpload(*both) for both in zip(parts, sketches))
    return CoLoraServer(frozen, tuple(Latest(*both) for both in zip(sent, weights)))


@pytest.mark.parametrize(("place", "client"), [(0, 1), (0, 2), (1, 0)])
def test_a_client_hears_the_others_by_similarity_and_weight(place, client):
    # "narrow" has kinds q and up, "wide" and "again" only q; "again" has the architecture of "wide".
    specs = (*make_specs(), dataclasses.replace(make_specs()[1], name="again", num_clients=2))
    server, tau = server_of(specs), 0.7
    everyone = [(c, i) for c, spec in enumerate(specs) for i in range(spec.num_clients)]
    sketches = [latest.sent.sketch for latest in server.latest]
    vector = lambda c, i, kinds: np.concatenate([sketches[c][k][i] for k in kinds])
    share = {}
    for c, i in everyone:
        kinds = sorted(set(sketches[c]) & set(sketches[place]))
        one, other = vector(place, client, kinds), vector(c, i, kinds)
        norms = np.linalg.norm(one) * np.linalg.norm(other)
        similar = one @ other / norms if norms > 0 else 0.0
        share[c, i] = 0 if (c, i) == (place, client) else server.latest[c].weights[i]
        share[c, i] *= np.exp(similar / tau)
    heard = hear(specs, server, place, jnp.int32(client), tau)
    for name in "pqab":
        for kind, got in heard[name].items():
            near = [
                (c, i)
                for c, i in everyone
                if kind in specs[c].kinds and (name in "pq" or (c == 0) == (place == 0))
            ]
            rows = [server.latest[c].sent.parts[name][kind][i] for c, i in near]
            expected = np.average(rows, axis=0, weights=[share[at] for at in near])
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def one_update(method, specs):
    """Let a client of the second toy cohort train for a round -> its state before and after, its upload."""
    bases, texts, data = toy.make_bases()[1:], toy.probe()[1:], toy.make_data(toy.make_specs())[1]
    state = toy.stir(h2.init_round(method, specs, bases, texts, jax.random.key(0)))
    one = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
    client, data = one(state.clients[0]), h2.ClientData(*one(tuple(data)))
    (download,) = method.broadcast(
        specs, jax.random.key(1), state.server, (jnp.arange(1),), state.round
    )
    download = h2.Download(download.common, one(download.personal))
    update = jax.jit(functools.partial(method.client_update, specs[0]))
    after, upload, _ = update(
        jax.random.key(2), bases[0], client, download, data, method.hyper, state.round
    )
    return client, after, upload


@pytest.mark.parametrize("sketch_numbers", [64, pytest.param(5, marks=pytest.mark.slow)])
def test_what_is_sketched_is_the_sum_of_the_gradients_over_a_rounds_steps(sketch_numbers):
    # Under plain descent it can be read off how far P and Q have gone: P_0 - P_1 = rate * sum.
    specs, rate = make_specs(budget=h2.Budget(batch_size=4, steps=3))[1:], 0.05
    options = {"optimizer": optax.identity(), "sketch_numbers": sketch_numbers}
    method = h2.co_lora(num_blocks=2, learning_rate=rate, **options)
    client, after, upload = one_update(method, specs)
    gone = {
        name: {"q": (np.float64(client.params[name]["q"]) - after.params[name]["q"]) / rate}
        for name in "pq"
    }
    # 2 blocks of P [2, 2] and Q [2] are 12 numbers: as they are, or projected.
    expected = sketch(jax.tree.map(f32, gone), ("q",), sketch_numbers)["q"]
    assert upload.sketch["q"].shape == (min(sketch_numbers, 12),)
    np.testing.assert_allclose(upload.sketch["q"], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_a_pull_to_the_download_is_not_taken_for_the_likeness_of_tasks():
    specs = make_specs(budget=h2.Budget(batch_size=4, steps=1))[1:]
    plain = h2.co_lora(num_blocks=2, optimizer=optax.identity(), learning_rate=0.05)
    _, free, expected = one_update(plain, specs)
    _, pulled, found = one_update(h2.proximal(plain, mu=2.0), specs)
    assert np.abs(free.params["p"]["q"] - pulled.params["p"]["q"]).max() > 1e-3
    np.testing.assert_allclose(found.sketch["q"], expected.sketch["q"], rtol=1e-4, atol=1e-5)


def test_silence_is_the_start_and_similar_to_nobody():
    specs = make_specs()
    server = server_of(specs)
    server = server._replace(latest=jax.tree.map(np.zeros_like, server.latest))
    sketches = tuple(latest.sent.sketch for latest in server.latest)
    for leaf in jax.tree.leaves(similarity(specs, sketches, 0, jnp.int32(0))):
        np.testing.assert_array_equal(leaf, 0)
    for name, parts in hear(specs, server, 0, jnp.int32(0), 1.0).items():
        for leaf in parts.values():
            np.testing.assert_array_equal(leaf, 0 if name in "pq" else 7)


def test_a_low_temperature_still_hears_the_most_similar():
    specs = make_specs()
    server = server_of(specs)
    sketches = tuple(latest.sent.sketch for latest in server.latest)
    similar = [np.array(x) for x in similarity(specs, sketches, 0, jnp.int32(0))]
    similar[0][0] = -np.inf
    for sims, latest in zip(similar, server.latest):
        sims[np.asarray(latest.weights) == 0] = -np.inf
    place = int(np.argmax([sims.max() for sims in similar]))
    nearest = int(similar[place].argmax())
    heard = hear(specs, server, 0, jnp.int32(0), 1e-4)
    for name in "pq":
        theirs = server.latest[place].sent.parts[name]
        for kind in set(theirs) & set(heard[name]):
            np.testing.assert_allclose(heard[name][kind], theirs[kind][nearest], rtol=1e-4)


def test_only_those_who_count_are_noted():
    old, sent = {"q": jnp.arange(4.0)}, {"q": jnp.asarray([10.0, 20.0, 30.0, 40.0])}
    ids, weights = jnp.asarray([2, 0, 0, 9]), jnp.asarray([1.0, 0.5, 0.0, 0.0])
    np.testing.assert_array_equal(note_latest(old, sent, ids, weights)["q"], [20, 1, 10, 3])


def test_sketches_are_common_and_keep_angles():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(40, 4, 4))
    grads = lambda p: {"p": {"q": f32(p)}, "q": {"q": f32(p[:, 0])}}
    small = sketch(grads(one[:1]), ("q",), 64)["q"]
    np.testing.assert_allclose(small, [*one[0].ravel(), *one[0, 0]], rtol=1e-6)
    other = one + 0.5 * rng.normal(size=one.shape)
    flat = lambda p: np.concatenate([p.ravel(), p[:, 0].ravel()])
    cosine = lambda u, v: u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    projected = [np.asarray(sketch(grads(p), ("q",), 256)["q"]) for p in (one, other)]
    assert projected[0].shape == (256,)
    assert abs(cosine(*projected) - cosine(flat(one), flat(other))) < 0.1


@functools.cache
def trained(**options):
    """Two rounds in which client 1 of the first cohort has weight 0."""
    specs, method = make_specs(), h2.co_lora(learning_rate=0.02, **options)
    first = toy.start(method, specs)
    round_fn = h2.make_round(method, specs, donate=False)
    weights = jnp.asarray([1.0, 0.0, 1.0, 1.0, 1.0]), None
    state = first
    for _ in range(2):
        state, metrics = round_fn(
            state, toy.make_bases(), toy.make_data(specs), None, weights, method.hyper, toy.SEED
        )
    return specs, method, first, state, metrics


@pytest.mark.parametrize(
    ("num_blocks", "kept"), [pytest.param(1, "restart", marks=pytest.mark.slow), (2, "kept")]
)
def test_a_round_of_it(num_blocks, kept):
    _, _, first, state, metrics = trained(num_blocks=num_blocks, optimizer_state=kept)
    # What is kept of an optimiser are its moments, not the sum of gradients beside them.
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(state.clients[0].opt) == shapes(first.clients[0].opt)
    assert bool(jax.tree.leaves(state.clients[0].opt)) == (kept == "kept")
    # The frozen factors stay; what counted clients sent is on the server as they left it.
    toy.assert_trees_equal(state.server.frozen, first.server.frozen)
    for place in (0, 1):
        sent, own = state.server.latest[place].sent.parts, state.clients[place].params
        for name in "pqab":
            for kind, rows in sent[name].items():
                np.testing.assert_array_equal(rows[0], own[name][kind][0])
                assert np.abs(rows[0]).max() > 0
    np.testing.assert_array_equal(state.server.latest[0].sent.parts["p"]["q"][1], 0)
    np.testing.assert_array_equal(state.server.latest[0].weights, [1, 0, 1, 1, 1])
    assert metrics.server["heard"] == 7
    # What travels, counted by hand: "narrow" has two kinds of width 8 and 2 layers.
    aligned, others = num_blocks * (4 + 2), (2 - num_blocks) * 2 * 8 * 2
    down, up = 2 * (aligned + others), 2 * (aligned + others + min(64, num_blocks * 6))
    assert metrics.clients["narrow"]["numbers_down"][0] == down
    assert metrics.clients["narrow"]["numbers_up"][0] == up
    # No array without entries: checkpoints refuse them.
    assert all(leaf.size for leaf in jax.tree.leaves(state))


def test_the_shared_branch_carries_what_others_learned():
    specs, method, _, state, _ = trained(num_blocks=1, optimizer_state="restart")
    evaluate = h2.make_evaluate(method, specs, batch_size=4, moment="downloaded")
    unheard = tuple(
        one._replace(weights=jnp.zeros_like(one.weights)) for one in state.server.latest
    )
    silent = state._replace(server=state.server._replace(latest=unheard))
    data = toy.make_data(specs)
    with_others = evaluate(state, toy.make_bases(), data)["wide"]["loss"]
    alone = evaluate(silent, toy.make_bases(), data)["wide"]["loss"]
    assert np.abs(with_others - alone).min() > 1e-4


@pytest.mark.parametrize(
    ("options", "specs", "message"),
    [
        ({"num_blocks": 3}, make_specs(), "num_blocks 3 is above its 2 layers"),
        ({"temperature": 0}, make_specs(), "temperature"),
        ({}, toy.make_specs(), "cohort 'wide': rank 4 differs from 2"),
        ({}, make_specs(targets=()), "targets is empty"),
        ({}, make_specs(kernels="triton"), "cohort 'narrow': kernels 'triton': no kernel computes"),
    ],
)
def test_what_cannot_be_is_refused(options, specs, message):
    with pytest.raises(h2.FederationError, match=message):
        toy.start(h2.co_lora(**options), specs)


def test_it_needs_public_texts():
    specs = make_specs()
    with pytest.raises(h2.FederationError, match="co_lora needs a probe"):
        h2.init_round(h2.co_lora(), specs, toy.make_bases(), None, jax.random.key(0))

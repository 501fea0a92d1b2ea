"""H2Tune in a common basis: its frozen basis, and who hears whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from tiny import CONFIGS, tiny_base

import h2tune_jax as h2
from h2tune_jax import tasks
from h2tune_jax.methods.h2tune.likeness import Signature, distance, signature
from h2tune_jax.methods.h2tune.options import H2TuneOptions, make_options
from h2tune_jax.methods.h2tune.similar import alike, hear, similarity
from h2tune_jax.methods.h2tune.state import H2TuneServer, H2TuneUpload, basis_of
from h2tune_jax.methods.latest import Latest
from h2tune_jax.models import build, config_from_hf, prune_depth
from h2tune_jax.types import Places

OPTIONS = H2TuneOptions(sharing="similar", temperature=0.4)
COMMON = {"core": "parallel", "basis": "singular", "selection": "leading"}


def test_the_preset_changes_by_keyword():
    assert make_options(h2.COMMON, {}) == h2.COMMON
    changed = make_options(h2.COMMON, {"learning_rate": 1e-4, "shared_rank": 4, "core_rank": 4})
    assert (changed.learning_rate, changed.shared_rate) == (1e-4, 1e-2)
    h2.h2tune(changed).check(toy.make_specs())
    with pytest.raises(h2.FederationError, match="site 'q' has 8 singular vectors"):
        h2.h2tune(h2.COMMON).check(toy.make_specs())


def test_the_singular_basis_belongs_to_the_frozen_weight():
    narrow, _ = toy.make_specs()
    base = toy.make_bases()[0]
    pruned_model = dataclasses.replace(narrow.model, num_layers=1, places=Places((1,), 2))
    pruned = dataclasses.replace(narrow, name="pruned", model=pruned_model)
    pruned_base = {k: v if k == "embed" else v[1:] for k, v in base.items()}
    method = h2.h2tune(**COMMON, shared_rank=3, core_rank=3, relation="places")
    specs, bases = (narrow, pruned), (base, pruned_base)
    state = h2.init_round(method, specs, bases, None, jax.random.key(0))
    assert state.server.middle.shape == (2, 2, 3, 3)
    np.testing.assert_array_equal(state.clients[1].relation[0], [[0], [1]])
    for kind in narrow.kinds:
        u, v = basis_of(state.server, narrow)[kind]
        for side in (u, v):
            eye = np.broadcast_to(np.eye(3), (2, 3, 3))
            np.testing.assert_allclose(side.mT @ side, eye, atol=1e-5)
        diagonal = np.asarray(u.mT @ base[kind] @ v)
        for layer in range(2):
            values = np.linalg.svd(np.asarray(base[kind][layer]), compute_uv=False)[:3]
            np.testing.assert_allclose(diagonal[layer], np.diag(values), atol=1e-5)
            peaks = np.abs(u[layer]).argmax(axis=0)
            assert (np.asarray(u)[layer, peaks, range(3)] > 0).all()
        # The pruned model's one layer is the whole one's second.
        for whole, cut in zip((u, v), basis_of(state.server, pruned)[kind]):
            np.testing.assert_allclose(whole[1:], cut, atol=1e-6)
        # Its own pair starts as a plain LoRA does.
        assert state.clients[0].a[kind].shape[-1] == narrow.rank
        assert not state.clients[0].b[kind].any()


@pytest.mark.parametrize("basis", ["singular", "seeded", "anchored"])
def test_cohorts_of_one_architecture_have_one_basis(basis):
    narrow, wide = toy.make_specs()
    again = dataclasses.replace(narrow, name="again", num_clients=1, rank=1)
    fewer = dataclasses.replace(again, name="fewer", targets=("q",))
    specs, (first, second), (texts, _) = (narrow, again, fewer, wide), toy.make_bases(), toy.probe()
    method = h2.h2tune(core="pure", basis=basis)
    start = lambda key: h2.init_round(
        method, specs, (first, first, first, second), (texts,) * 4, key
    )
    server = jax.eval_shape(start, jax.random.key(0)).server
    assert len(server.bases) == 3
    assert basis_of(server, again) is basis_of(server, narrow)
    assert set(basis_of(server, fewer)) == {"q"}
    assert basis_of(server, wide)["q"][0].shape == (3, 12, 4)


def make_server(values, heard):
    """A server of one slot, one kind and R = 2, that holds what each client has sent."""
    latest = tuple(
        Latest(
            H2TuneUpload(
                jnp.asarray(rows, jnp.float32).reshape(-1, 1, 1, 2, 2),
                jnp.asarray(masks, bool).reshape(-1, 1, 1, 2, 2),
            ),
            jnp.asarray(weights, jnp.float32),
        )
        for (rows, masks), weights in zip(values, heard)
    )
    return H2TuneServer(jnp.full((1, 1, 2, 2), 9.0), {}, latest)


def two_cohorts():
    narrow, wide = toy.make_specs(targets=("q",))
    return (
        dataclasses.replace(narrow, num_clients=2),
        dataclasses.replace(wide, num_clients=1),
    )


SENT = (
    # The second client sent the first row alone.
    ([[1, 0, 0, 2], [3, 4, 7, 7]], [[1, 1, 1, 1], [1, 1, 0, 0]]),
    ([[0, 1, 0, 0]], [[1, 1, 1, 1]]),
)


def test_whom_a_client_hears_by_hand():
    specs, server = two_cohorts(), make_server(SENT, ([1, 1], [2]))
    uploads = tuple(one.sent for one in server.latest)
    own, other = similarity(specs, uploads, 0, jnp.int32(0))
    np.testing.assert_allclose(own, [1, 3 / 5], rtol=1e-6)  # over the first row: (1, 0) and (3, 4)
    np.testing.assert_allclose(other, [0], atol=1e-7)
    tau = OPTIONS.temperature
    w = np.array([1, np.exp((0.6 - 1) / tau), 2 * np.exp(-1 / tau)])
    first = (w @ np.array([[1, 0], [3, 4], [0, 1]])) / w.sum()
    second = (w[[0, 2]] @ np.array([[0, 2], [0, 0]])) / w[[0, 2]].sum()
    found = hear(OPTIONS, specs, server, 0, jnp.int32(0))
    np.testing.assert_allclose(found[0, 0], [first, second], rtol=1e-5)


def test_kinds_are_matched_by_their_names():
    # (q, up) against (q, gate, up): `up` stands at another place.
    one = toy.make_specs()[0]
    sites = dict.fromkeys(("q", "gate", "up"), (8, 8))
    other = dataclasses.replace(
        one, name="other", model=h2.ModelSpec(num_layers=2, sites=sites), targets=None
    )
    specs = dataclasses.replace(one, num_clients=1), dataclasses.replace(other, num_clients=1)
    rng = np.random.default_rng(0)
    sent = [rng.normal(size=(1, 1, len(spec.kinds), 2, 2)) for spec in specs]
    uploads = tuple(
        H2TuneUpload(jnp.asarray(rows, jnp.float32), jnp.ones(rows.shape, bool)) for rows in sent
    )
    for place in (0, 1):
        found = similarity(specs, uploads, place, jnp.int32(0))[1 - place]
        ours, theirs = (
            np.concatenate([rows[0, 0, spec.kinds.index(kind)].ravel() for kind in ("q", "up")])
            for spec, rows in zip(specs, sent)
        )
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        np.testing.assert_allclose(found, [cosine], rtol=1e-5)
    assert specs[0].kinds.index("up") != specs[1].kinds.index("up")


def test_who_is_far_from_all_that_hold_a_part_still_hears_them():
    specs, server = two_cohorts(), make_server(SENT, ([1, 1], [2]))
    options = H2TuneOptions(sharing="similar", temperature=0.004)
    found = hear(options, specs, server, 0, jnp.int32(1))
    # The second row is held by the others alone: likeness 0.6 and 0.8, e^50 apart; both far from its own.
    np.testing.assert_allclose(found[0, 0, 0], [3, 4], rtol=1e-5)
    assert float(np.abs(found[0, 0, 1] - 9).min()) > 1  # not what everyone starts from


def test_who_was_never_heard_gets_the_plain_mean():
    specs, server = two_cohorts(), make_server(SENT, ([0, 1], [1]))
    silent = server.latest[0].sent
    zero = silent._replace(middle=silent.middle.at[0].set(0), mask=silent.mask.at[0].set(False))
    server = server._replace(latest=(server.latest[0]._replace(sent=zero), server.latest[1]))
    found = hear(OPTIONS, specs, server, 0, jnp.int32(0))
    np.testing.assert_allclose(found[0, 0], [[1.5, 2.5], [0, 0]], rtol=1e-6)
    nobody = server._replace(
        latest=tuple(one._replace(weights=0 * one.weights) for one in server.latest)
    )
    np.testing.assert_array_equal(hear(OPTIONS, specs, nobody, 0, jnp.int32(0)), server.middle)


@pytest.mark.parametrize(("place", "client"), [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])
def test_what_each_client_is_sent_by_the_likeness_of_data(place, client):
    """By its definition in float64, one client and one entry after the other."""
    narrow, wide = toy.make_specs()  # with kinds q and up, and q
    specs = dataclasses.replace(narrow, num_clients=3), dataclasses.replace(wide, num_clients=2)
    rng, tau = np.random.default_rng(0), 0.7
    options = H2TuneOptions(sharing="similar", similarity="data", temperature=tau)
    # The second client of the first cohort was never heard. The data of two stand less than chance apart.
    weights = [np.array([1.5, 0.0, 0.5]), np.array([2.0, 1.0])]
    means = [np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), np.array([[1.5, 1.0], [3.0, -1.0]])]
    variances = [np.array([1.0, 0.0, 2.0]), np.array([0.5, 0.25])]
    values, masks = [], []
    for spec in specs:
        shape = spec.num_clients, 2, len(spec.kinds), 2, 2  # two slots, R = 2
        values.append(rng.normal(size=shape))
        masks.append(rng.random(shape) < 0.6)
    values[0][1], masks[0][1] = 0.0, False
    masks[0][:, 0, 0, 0, 0] = masks[1][:, 0, 0, 0, 0] = False  # an entry that nobody has sent
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    latest = tuple(
        Latest(H2TuneUpload(f32(v), jnp.asarray(m), Signature(f32(mean), f32(var))), f32(w))
        for v, m, mean, var, w in zip(values, masks, means, variances, weights)
    )
    start = rng.normal(size=(2, 2, 2, 2))
    server = H2TuneServer(f32(start), {}, latest)

    shares = []
    for other in (0, 1):
        for i in range(specs[other].num_clients):
            apart = np.sum((means[other][i] - means[place][client]) ** 2)
            d = apart / max(variances[other][i] + variances[place][client], 1e-30)
            near = np.exp(-max(d - 1, 0) / tau) if weights[place][client] > 0 else 1.0
            shares.append((other, i, weights[other][i] * near))
    expected = start[:, : len(specs[place].kinds)].copy()
    for at in np.ndindex(*expected.shape):
        sent = [
            (share, values[other][i][at])
            for other, i, share in shares
            if at[1] < len(specs[other].kinds) and masks[other][i][at]
        ]
        if sum(share for share, _ in sent) > 0:
            expected[at] = np.average([x for _, x in sent], weights=[share for share, _ in sent])
    found = hear(options, specs, server, place, jnp.int32(client))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[0, 0, 0, 0], f32(start[0, 0, 0, 0]))


def test_data_of_one_kind_are_a_chance_apart():
    """Clients of two models whose spaces are rotations of each other, and of two kinds of data."""
    rng = np.random.default_rng(0)
    narrow, _ = toy.make_specs()
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    texts = rng.normal(size=(30, 8)).astype(np.float32)
    identity = lambda base, examples: (examples["x"] @ base)[None]
    spec = dataclasses.replace(
        narrow, model=dataclasses.replace(narrow.model, layer_outputs_fn=identity)
    )

    def describe(shift, base, count=400):
        rows = rng.normal(size=(count + 50, 8)).astype(np.float32) + shift
        rows[count:] = 1e3  # padding, which must not matter
        data = h2.ClientData({"x": jnp.asarray(rows)}, jnp.int32(count))
        return signature(spec, base, data, jnp.asarray(texts) @ base, count + 50)

    found = [describe(shift, base) for shift in (0.0, 0.4) for base in (np.eye(8), turn, turn)]
    others = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    apart = np.stack([distance(one, others) for one in found])
    same = np.kron(np.eye(2), np.ones((3, 3))).astype(bool)
    assert (np.diag(apart) == 0).all()
    assert 0.2 < apart[same & ~np.eye(6, dtype=bool)].mean() < 2
    assert apart[~same].min() > 10
    # One example says nothing: such a client is as near to all.
    alone = distance(describe(0.4, np.eye(8), count=1), others)
    np.testing.assert_allclose(alone, 0, atol=1e-3)


def test_examples_are_described_evenly_spaced():
    narrow, _ = toy.make_specs()
    read = lambda base, examples: examples["x"][None]
    spec = dataclasses.replace(
        narrow, model=dataclasses.replace(narrow.model, layer_outputs_fn=read)
    )
    rows = jax.random.normal(jax.random.key(0), (12, 5))
    probe = jax.random.normal(jax.random.key(1), (7, 5))
    sign = lambda rows, held, count: signature(
        spec, None, h2.ClientData({"x": rows}, jnp.int32(held)), probe, count
    )
    toy.assert_trees_close(sign(rows, 10, 4), sign(rows[jnp.array([0, 2, 5, 7])], 4, 4))
    toy.assert_trees_close(sign(rows, 3, 4), sign(rows[:3], 3, 3))


@pytest.mark.parametrize("arch", ["bert", "gemma2"])
def test_the_first_layer_is_read_without_those_behind_it(arch):
    model = build(config_from_hf({**CONFIGS[arch], "num_hidden_layers": 4}))
    base = model.init_fn(jax.random.key(0))
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(1, 60, size=(3, 5)))
    texts = {"input_ids": ids, "attention_mask": jnp.asarray([[1] * 5, [1] * 3 + [0] * 2, [1] * 5])}
    # Bit for bit that of the whole model, and of a pruned one that begins alike.
    first = jax.jit(model.spec.first_layer)(base, texts)
    np.testing.assert_array_equal(first, jax.jit(model.spec.layer_outputs_fn)(base, texts)[0])
    pruned, own = prune_depth(model, base, layers=[0, 2, 3])
    np.testing.assert_array_equal(first, jax.jit(pruned.spec.first_layer)(own, texts))
    few = jax.tree.map(lambda leaf: leaf[:2], base["layers"])
    np.testing.assert_array_equal(
        first, jax.jit(model.spec.first_layer)({**base, "layers": few}, texts)
    )


def questions():
    """Three questions of two choices each, as a task of multiple choice has them."""
    rng = np.random.default_rng(2)
    mask = np.arange(5) < rng.integers(3, 6, size=(3, 2, 1))
    return {
        "input_ids": jnp.asarray(rng.integers(1, 60, size=(3, 2, 5)), jnp.int32),
        "attention_mask": jnp.asarray(mask),
        "answer_mask": jnp.asarray(mask & (np.arange(5) > 1)),
        "labels": jnp.asarray([0, 1, 1], jnp.int32),
    }


def test_a_question_is_described_by_the_mean_over_its_choices():
    model, base = tiny_base("gpt2")
    texts = questions()
    read = jax.jit(model.spec.layer_outputs_fn)
    choices = [
        read(base, {name: texts[name][:, choice] for name in ("input_ids", "attention_mask")})
        for choice in range(2)
    ]
    expected = np.mean(np.asarray(choices, np.float64), axis=0)
    np.testing.assert_allclose(read(base, texts), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.jit(model.spec.first_layer)(base, texts), expected[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "method", [h2.h2tune(h2.COMMON, shared_rank=4, core_rank=4), h2.ce_lora()], ids=lambda m: m.name
)
def test_methods_that_describe_data_take_questions_with_choices(method):
    model, base = tiny_base("gpt2")
    spec = h2.CohortSpec(
        name="choices",
        num_clients=2,
        model=model.spec,
        rank=2,
        loss_fn=tasks.make_loss_fn(tasks.forward_of(model, "multiple_choice"), "multiple_choice"),
        budget=h2.Budget(batch_size=2, epochs=1),
    )
    examples = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), questions())
    data = h2.ClientData(examples, jnp.asarray([3, 2], jnp.int32))
    probe = {"input_ids": jnp.ones((4, 6), jnp.int32)}

    def train(key):
        state = h2.init_round(method, (spec,), (base,), (probe,), key)
        round_fn = h2.make_round(method, (spec,))
        return round_fn(state, (base,), (data,), None, None, method.hyper, toy.SEED)[0].server

    (latest,) = jax.eval_shape(train, jax.random.key(0)).latest
    described = latest.sent.moments if method.name == "ce_lora" else latest.sent.signature.mean
    assert described.shape == (2, *((2, 32) if method.name == "ce_lora" else (4,)))


def test_who_is_alike_by_hand():
    signatures = Signature(jnp.array([[0.0, 0.0], [3.0, 0.0]]), jnp.array([1.0, 2.0]))
    upload = H2TuneUpload(jnp.zeros(0), jnp.zeros(0), signatures)
    np.testing.assert_allclose(alike((upload,), 0, jnp.int32(0), jnp.array(True))[0], [0, -2])
    np.testing.assert_array_equal(alike((upload,), 0, jnp.int32(0), jnp.array(False))[0], 0)


@pytest.mark.slow
def test_sharing_nothing_is_to_be_alone():
    specs = toy.make_specs()
    bases, data = toy.make_bases(), toy.make_data(specs)
    states = {}
    for sharing, ids in (("none", None), ("mean", (jnp.array([1]), jnp.array([], jnp.int32)))):
        method = h2.h2tune(**COMMON, learning_rate=0.02, sharing=sharing)
        state = h2.init_round(method, specs, bases, None, jax.random.key(0))
        round_fn = h2.make_round(method, specs)
        for _ in range(3):
            state, metrics = round_fn(state, bases, data, ids, None, method.hyper, toy.SEED)
        states[sharing] = state
        assert metrics.clients["narrow"]["numbers_up"][0] == (0 if sharing == "none" else 2 * 2 * 4)
    alone, one = (
        jax.tree.map(lambda leaf: leaf[1], state.clients[0]._replace(copy=None))
        for state in states.values()
    )
    toy.assert_trees_close(alone, one)
    assert not np.asarray(states["none"].server.middle).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": "parallel"}, "excludes basis 'random'"),
        ({"core_rank": 2}, "core_rank excludes core 'residual'"),
        ({"sharing": "similar", "upload": "transpose"}, "excludes upload 'transpose'"),
        ({"sharing": "everything"}, "allowed: mean, similar, none"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(h2.FederationError, match=message):
        h2.h2tune(**options)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"core_rank": 5, "shared_rank": 4}, {}, "core_rank 5 is above shared_rank R = 4"),
        ({"shared_rank": 9}, {}, "site 'q' has 8 singular vectors"),
        ({}, {"kernels": "triton"}, "no kernel computes core 'parallel'"),
    ],
)
def test_refused_federations(options, change, message):
    with pytest.raises(h2.FederationError, match=message):
        h2.h2tune(**COMMON, **options).check(toy.make_specs(**change))

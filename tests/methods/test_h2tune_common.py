"""H2Tune in a common basis: its frozen basis, and who hears whom."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.methods.h2tune.likeness import Signature, distance, signature
from h2tune_jax.methods.h2tune.options import H2TuneOptions, make_options
from h2tune_jax.methods.h2tune.similar import alike, hear, similarity
from h2tune_jax.methods.h2tune.state import H2TuneServer, H2TuneUpload
from h2tune_jax.methods.latest import Latest
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
        u, v = state.server.starts["narrow"].basis[kind]
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
        for whole, cut in zip((u, v), state.server.starts["pruned"].basis[kind]):
            np.testing.assert_allclose(whole[1:], cut, atol=1e-6)
        # Its own pair starts as a plain LoRA does.
        assert state.clients[0].a[kind].shape[-1] == narrow.rank
        assert not state.clients[0].b[kind].any()


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

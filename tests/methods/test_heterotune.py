"""HeteroTune: CMGA against a plain float64 account of it, and who holds which branches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy

import h2tune_jax as h2
from h2tune_jax.methods.heterotune.cmga import Branches, Part, mean_update

ENDS = np.array([2, 5])  # two branches, of widths 2 and 3


def build(**options):
    return h2.heterotune(**{"size": 4, "widths": (2, 3), "learning_rate": 0.02, **options})


def parts_of(seed=0):
    """Cohorts as in a federation: slots 0 and 2 with one branch, all three slots with both."""
    rng = np.random.default_rng(seed)
    parts = []
    for clients, slots, width in ((4, [0, 2], 2), (3, [0, 1, 2], 5)):
        lead = clients, len(slots)
        draw = lambda *shape, lead=lead: rng.normal(size=(*lead, *shape))
        weights = np.arange(clients) % 3 + 0.5
        updates = [draw(4, width), draw(width, 4)]
        weights[1] = 0.0
        for leaf in updates:
            leaf[1] = 0.0  # so the engine sends a client of weight zero
        updates = Branches(*(jnp.asarray(leaf, jnp.float32) for leaf in updates))
        parts.append(Part(np.array(slots), width, updates, jnp.asarray(weights, jnp.float32)))
    return parts


def literally(parts, aligned):
    """CMGA as it is told, one branch of one slot after the other, in float64."""
    inner, outer = np.zeros((3, 4, 5)), np.zeros((3, 5, 4))
    for slot in range(3):
        for begin, end in ((0, 2), (2, 5)):
            updates, weights = [], []
            for part in parts:
                if slot not in part.slots or part.width < end:
                    continue
                at = list(part.slots).index(slot)
                for one, other, weight in zip(*part.updates, part.weights):
                    pair = np.asarray(one[at, :, begin:end]), np.asarray(other[at, begin:end])
                    updates.append(np.concatenate([p.ravel() for p in pair]).astype(np.float64))
                    weights.append(float(weight))
            if not sum(weights):
                continue
            mean = lambda rows, w=weights: np.average(rows, axis=0, weights=w)
            u = step = mean(updates)
            if aligned:
                kept = [d - min(d @ u, 0) / (u @ u) * u for d in updates]
                step = mean(kept)
                step = step / np.linalg.norm(step) * mean([np.linalg.norm(d) for d in updates])
            count = 4 * (end - begin)
            inner[slot, :, begin:end] = step[:count].reshape(4, -1)
            outer[slot, begin:end] = step[count:].reshape(-1, 4)
    return inner, outer


@pytest.mark.parametrize("aligned", [True, False])
def test_the_server_aligns_branch_by_branch_over_the_holders(aligned):
    parts = parts_of()
    server = Branches(jnp.ones((3, 4, 5)), jnp.ones((3, 5, 4)))
    step, conflicts = mean_update(server, parts, ENDS, aligned=aligned)
    for got, expected in zip(step, literally(parts, aligned)):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert 0 < conflicts < 1


def test_updates_against_the_mean_by_hand():
    # Along one axis: 3, 3 and -1. Their mean is 5/3; the third, going backwards, is emptied; what is
    # left means 2, and is rescaled to the mean norm 7/3.
    inner = jnp.zeros((3, 1, 1, 1)).at[:, 0, 0, 0].set(jnp.asarray([3.0, 3.0, -1.0]))
    part = Part(np.array([0]), 1, Branches(inner, jnp.zeros((3, 1, 1, 1))), jnp.ones(3))
    server = Branches(jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1)))
    step, conflicts = mean_update(server, [part], np.array([1]), aligned=True)
    np.testing.assert_allclose(step.inner, [[[7 / 3]]], rtol=1e-6)
    np.testing.assert_allclose(conflicts, 1 / 3, rtol=1e-6)


def test_updates_that_cancel_and_a_branch_that_nobody_holds_move_nothing():
    inner = jnp.zeros((2, 1, 1, 1)).at[:, 0, 0, 0].set(jnp.asarray([2.0, -2.0]))
    part = Part(np.array([1]), 1, Branches(inner, jnp.zeros((2, 1, 1, 1))), jnp.ones(2))
    server = Branches(jnp.zeros((2, 1, 2)), jnp.zeros((2, 2, 1)))
    step, _ = mean_update(server, [part], np.array([1, 2]), aligned=True)
    for leaf in step:
        np.testing.assert_array_equal(leaf, 0)


def test_clients_hold_the_first_branches_at_the_slots_of_their_depth():
    specs = toy.make_specs()  # ranks 2 and 4, 2 and 3 layers
    method = build()
    server = method.init_server(specs, jax.random.key(0), None, None)
    assert server.inner.shape == (3, 4, 5)
    narrow, wide = method.broadcast(specs, jax.random.key(0), server, None, None)
    np.testing.assert_array_equal(narrow.common.inner, server.inner[np.array([0, 2]), :, :2])
    np.testing.assert_array_equal(wide.common.outer, server.outer)
    method = build(branches={"narrow": 2, "wide": 1})
    narrow, wide = method.broadcast(specs, jax.random.key(0), server, None, None)
    assert narrow.common.inner.shape == (2, 4, 5)
    assert wide.common.inner.shape == (3, 4, 2)


def test_layers_that_meet_in_a_slot_use_one_set_of_branches():
    specs = toy.make_specs()
    method = build(num_slots=2)
    state = toy.stir(toy.start(method, specs))
    download = method.broadcast(specs, jax.random.key(0), state.server, None, None)[1]
    client = jax.tree.map(lambda leaf: leaf[0], state.clients[1])
    mixture = method.adapters(specs[1], state.server, client, download).sites["block"]
    # Three layers on two slots: at 0, 0.5 (to the even one) and 1.
    np.testing.assert_array_equal(mixture.inner, state.server.inner[np.array([0, 0, 1])])
    round_fn = h2.make_round(method, specs, donate=False)
    after, _ = round_fn(
        state, toy.make_bases(), toy.make_data(specs), None, None, method.hyper, toy.SEED
    )
    for old, new in zip(state.server, after.server):
        assert (np.abs(new - old).max(axis=(1, 2)) > 0).all()


def test_only_branches_leave_a_client():
    specs, method = toy.make_specs(), build()
    state = toy.start(method, specs)
    download = method.broadcast(specs, jax.random.key(0), state.server, None, None)[0]
    client = jax.tree.map(lambda leaf: leaf[0], state.clients[0])
    data = jax.tree.map(lambda leaf: leaf[0], toy.make_data(specs)[0])
    args = method.hyper, jnp.zeros((), jnp.int32)
    _, upload, metrics = method.client_update(
        specs[0], jax.random.key(1), toy.make_bases()[0], client, download, data, *args
    )
    assert [leaf.shape for leaf in jax.tree.leaves(upload)] == [(2, 4, 2), (2, 2, 4)]
    assert int(metrics["numbers_up"]) == int(metrics["numbers_down"]) == 2 * 2 * 4 * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, "widths"),
        ({"size": 0}, "size"),
        ({"alignment": "cga"}, "alignment"),
        ({"branches": {"narow": 1}}, "did you mean 'narrow'"),
        ({"branches": {"narrow": 3}}, "branches: 3 is above the 2 there are"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(h2.FederationError, match=message):
        toy.start(build(**options))


def test_a_model_that_takes_no_block_adapters_is_refused():
    specs = toy.make_specs()
    bare = dataclasses.replace(specs[0], model=dataclasses.replace(specs[0].model, width=None))
    with pytest.raises(h2.FederationError, match=r"cohort 'narrow': model\.width is not set"):
        toy.start(build(), (bare, specs[1]))
    with pytest.raises(h2.FederationError, match="kernels 'triton': no kernel computes block adap"):
        toy.start(build(), toy.make_specs(kernels="triton"))


def test_a_client_without_examples_does_not_dilute_the_mean():
    specs, method = toy.make_specs(), build()
    state, (narrow, wide) = toy.start(method, specs), toy.make_data(toy.make_specs())
    round_fn = h2.make_round(method, specs, donate=False)
    run = lambda count, weight: round_fn(
        state, toy.make_bases(), (narrow._replace(num_examples=narrow.num_examples.at[1].set(count)), wide),
        None, (jnp.ones(5).at[1].set(weight), None), method.hyper, toy.SEED,
    )[0].server  # fmt: skip
    toy.assert_trees_equal(run(0, 1.0), run(9, 0.0))
    assert any((a != b).any() for a, b in zip(run(0, 1.0), run(9, 1.0)))


def test_a_server_optimiser_may_take_its_step():
    specs, method = toy.make_specs(), build()
    wrapped = h2.server_optimizer(method, optax.sgd(2.0))
    uploads = tuple(part.updates for part in parts_of())
    weights = jnp.asarray([1.0, 0.0, 2.0, 1.0]), jnp.ones(3)

    def step(method):
        server = method.init_server(specs, jax.random.key(0), None, None)
        rest = uploads, weights, None, jnp.int32(0)
        return server, method.server_aggregate(specs, None, server, None, None, *rest)[0]

    start, once = step(method)
    _, twice = step(wrapped)
    for old, one, two in zip(start, once, twice.inner):
        np.testing.assert_allclose(two - old, 2 * (one - old), rtol=1e-4, atol=1e-6)
        assert np.abs(one - old).max() > 0

"""H2Tune's terms and rules by hand-computed numbers; `tests/oracle` holds whole rounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.test_util import check_grads

import h2tune_jax as h2
from h2tune_jax.adapters import triple
from h2tune_jax.methods.h2tune import state as h2tune_state
from h2tune_jax.methods.h2tune import terms
from h2tune_jax.methods.h2tune.options import make_options
from h2tune_jax.tasks import losses


def test_norms_and_their_gradient_at_zero():
    rows = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_array_equal(terms.safe_norm(rows), [5.0, 0.0])
    gradient = jax.grad(lambda x: terms.safe_norm(x).sum())(rows)
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    check_grads(lambda x: terms.safe_norm(x).sum(), (rows[:1],), order=2, modes=["rev"])


def test_norm_term_by_hand():
    core = jnp.array([3.0, 4.0, 0.0, 0.0]).reshape(1, 1, 2, 2)  # 5
    scores = jnp.array([[[0.0, 2.0, 0.0]]])  # 2
    own = jnp.array([[1.0], [0.0]])  # 1
    np.testing.assert_allclose(terms.norm_term(core, scores, own), (5 + 2 + 1) / 3, rtol=1e-6)
    np.testing.assert_allclose(terms.norm_term(core, None, own), (5 + 1) / 2, rtol=1e-6)


def test_kl_divergence_by_hand():
    target, logits = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    np.testing.assert_allclose(terms.kl_divergence(target, logits), expected, rtol=1e-6)
    # Logits may be shifted by any constant.
    np.testing.assert_allclose(terms.kl_divergence(target + 3, logits - 2), expected, rtol=1e-5)


def test_keep_term_is_absent_at_a_first_participation():
    last = jnp.arange(16.0).reshape(1, 1, 4, 4)
    index = jnp.array([[[0, 1, 4, 5]]], jnp.int32)
    core = jnp.zeros((1, 1, 2, 2))
    soft = np.exp([0.0, 1.0, 4.0, 5.0])
    soft /= soft.sum()
    expected = (soft * np.log(soft / 0.25)).sum()
    term = terms.keep_term(last, core, index, jnp.array(True))
    np.testing.assert_allclose(term, expected, rtol=1e-5)
    assert terms.keep_term(last, core, index, jnp.array(False)) == 0


@pytest.mark.parametrize(("average", "expected"), [("positions", 2 / 3), ("batch", 2 / 2)])
def test_distillation_counts_the_positions_that_the_loss_counts(average, expected):
    # Two sequences of three positions; KL is 1 at one position and 2 at another that do not count.
    unit = jnp.log(jnp.array([0.5, 0.5]))
    shifted = jnp.array([0.0, 0.0])
    kl = float(terms.kl_divergence(unit, jnp.log(jnp.array([0.1, 0.9]))))
    far = jnp.log(jnp.array([0.1, 0.9]))
    logits = jnp.stack([jnp.stack([far, shifted, far]), jnp.stack([far, far, far])])
    positions = jnp.array([[1, 1, 1], [0, 0, 0]])
    batch = h2.Batch({}, jnp.array([True, True]))
    teacher = jnp.zeros_like(logits)
    metrics = {"logits": logits, "positions": positions}
    term = terms.distil_term(teacher, metrics, batch, average)
    np.testing.assert_allclose(term, expected * kl, rtol=1e-6)


def test_distillation_defaults_to_the_batch_mask():
    logits = jnp.array([[0.0, 1.0], [5.0, 0.0]])
    batch = h2.Batch({}, jnp.array([True, False]))
    term = terms.distil_term(jnp.zeros((2, 2)), {"logits": logits}, batch, "positions")
    np.testing.assert_allclose(term, terms.kl_divergence(jnp.zeros(2), logits[0]), rtol=1e-6)


def softmax(logits):
    soft = np.exp(logits - logits.max())
    return soft / soft.sum()


def test_a_class_that_is_masked_out_by_infinity_adds_nothing_to_distillation():
    # Of four classes the second is absent in both; to the last the teacher alone gives nothing.
    teacher, logits = np.array([0.3, -np.inf, -1.2, -np.inf]), np.array([-0.5, -np.inf, 0.8, 0.1])
    p, q = softmax(teacher), softmax(logits)
    kl = sum(p[i] * np.log(p[i] / q[i]) for i in (0, 2))
    batch = h2.Batch({}, jnp.array([True]))
    given = jnp.asarray(logits, jnp.float32)[None], jnp.asarray(teacher, jnp.float32)[None]
    term = lambda logits, teacher: terms.distil_term(
        teacher, {"logits": logits}, batch, "positions"
    )
    value, grads = jax.value_and_grad(term, argnums=(0, 1))(*given)
    np.testing.assert_allclose(value, kl, rtol=1e-6)
    # d/dz_j = q_j - p_j;  d/dt_j = p_j (log(p_j / q_j) - KL), 0 where p_j is.
    of_teacher = [p[i] * (np.log(p[i] / q[i]) - kl) if p[i] else 0.0 for i in range(4)]
    np.testing.assert_allclose(grads[0][0], q - p, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads[1][0], of_teacher, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("average", ["positions", "batch"])
@pytest.mark.parametrize("anything", [np.inf, -np.inf, np.nan])
def test_logits_that_do_not_count_may_be_anything_in_distillation(average, anything):
    logits = np.array([[0.2, -0.4, 1.0], [0.5, 0.1, -2.0]])
    teacher = np.array([[1.0, 0.0, -1.0], [0.3, 0.3, 0.3]])
    logits[1, 1] = teacher[1, 2] = anything  # of the row that is padding
    p, q = softmax(teacher[0]), softmax(logits[0])
    batch = h2.Batch({}, jnp.array([True, False]))
    given = jnp.asarray(logits, jnp.float32), jnp.asarray(teacher, jnp.float32)
    term = lambda logits, teacher: terms.distil_term(teacher, {"logits": logits}, batch, average)
    value, grads = jax.value_and_grad(term, argnums=(0, 1))(*given)
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], [q - p, [0, 0, 0]], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(grads[1][1], 0)


def test_a_loss_that_masks_absent_classes_by_infinity_is_trained():
    def only_two_of_three(adapters, base, batch, key):
        site = jax.tree.map(lambda leaf: leaf[0], adapters.sites["q"])
        logits = h2.adapted(batch.examples["x"], base, site) @ adapters.head
        logits = logits + jnp.array([[0.0, 0.0, -jnp.inf]])
        logits = logits + jnp.where(batch.mask, 0.0, jnp.nan)[:, None]  # rows that fill a batch up
        return losses.classification(logits, batch.examples["y"], batch.mask)

    method = h2.h2tune(learning_rate=0.02, warmup_rounds=0)  # distils by default
    spec = toy.cohort("only", width=6, depth=1, rank=2, kinds=("q",), classes=3, num_clients=3)
    specs = (dataclasses.replace(spec, loss_fn=only_two_of_three),)
    bases, data = (jnp.eye(6),), toy.make_data(toy.make_specs())[1:]
    state = toy.stir(h2.init_round(method, specs, bases, None, jax.random.key(0)))
    args = bases, data, None, None, method.hyper, toy.SEED
    _, metrics = h2.make_round(method, specs)(state, *args)
    assert metrics.rejected == {"only": 0}
    assert (np.asarray(metrics.clients["only"]["distil"]) > 0).all()


def test_kinds_and_slots_that_a_client_lacks_do_not_dilute():
    method = h2.h2tune(selection="leading", learning_rate=0.02, alternation="joint")
    specs = toy.make_specs()
    assert h2.shared_kinds(specs) == ("q", "up")
    state = toy.stir(toy.start(method))
    before = np.asarray(state.server.middle)
    ids = jnp.array([], jnp.int32), None
    round_fn = h2.make_round(method, specs, donate=False)
    args = toy.make_bases(), toy.make_data(specs)
    only_wide, _ = round_fn(state, *args, ids, toy.EVERYONE, method.hyper, toy.SEED)
    after = np.asarray(only_wide.server.middle)
    np.testing.assert_array_equal(after[:, 1], before[:, 1])  # nobody there has an `up`
    assert (after[:, 0] != before[:, 0]).all()  # rank 4 of R = 4 in all three slots
    ids = None, jnp.array([], jnp.int32)
    only_narrow, _ = round_fn(state, *args, ids, toy.EVERYONE, method.hyper, toy.SEED)
    after = np.asarray(only_narrow.server.middle)
    np.testing.assert_array_equal(after[1], before[1])  # two layers speak to slots 0 and 2
    changed = after != before
    assert changed[0, :, :2, :2].all()
    assert not changed[:, :, 2:].any()  # rank 2 of R = 4: the leading block alone
    assert not changed[..., 2:].any()


def test_the_mean_weighs_clients_entry_by_entry():
    method = h2.h2tune()
    narrow, wide = toy.make_specs()
    previous = jnp.full((1, 2, 2, 2), 7.0)
    server = h2tune_state.H2TuneServer(previous, {})
    upload = lambda value, mask, kinds: h2.methods.h2tune.H2TuneUpload(
        jnp.full((1, kinds, 2, 2), value), jnp.asarray(mask).reshape(1, kinds, 2, 2)
    )
    ones = [[1, 0, 0, 1]]
    parts = (
        method.reduce(narrow, upload(1.0, ones * 2, 2), jnp.float32(1.0)),
        method.reduce(wide, upload(4.0, [[1, 1, 0, 0]], 1), jnp.float32(3.0)),
    )
    none = (jnp.zeros(1),) * 2
    after, _ = method.server_aggregate(
        (narrow, wide), jax.random.key(0), server, (), None, parts, none, none, jnp.int32(0)
    )
    # q: (1*1 + 3*4) / 4, 4, kept, 1; up: 1, kept, kept, 1.
    np.testing.assert_allclose(after.middle[0, 0], [[13 / 4, 4], [7, 1]])
    np.testing.assert_allclose(after.middle[0, 1], [[1, 7], [7, 1]])


def test_traffic_counts_what_has_to_travel():
    specs = toy.make_specs()
    args = toy.make_bases(), toy.make_data(specs), toy.EVERYONE, toy.EVERYONE
    counts = {}
    for average in ("selected", "all"):
        method = h2.h2tune(average=average, alternation="joint")
        _, metrics = h2.make_round(method, specs)(toy.start(method), *args, method.hyper, toy.SEED)
        counts[average] = {n: int(m["numbers_up"][0]) for n, m in metrics.clients.items()}
        assert int(metrics.clients["wide"]["numbers_down"][0]) == 3 * 1 * 16
    # narrow: 2 of 3 slots, 2 kinds, r*r = 4 or R*R = 16; wide: 3 slots, 1 kind, 16 either way.
    assert counts["selected"] == {"narrow": 2 * 2 * 4, "wide": 3 * 16}
    assert counts["all"] == {"narrow": 2 * 2 * 16, "wide": 3 * 16}


def test_nothing_but_the_middle_matrices_leaves_a_client():
    method, spec = h2.h2tune(), toy.make_specs()[0]
    state = toy.start(method)
    client = jax.tree.map(lambda x: x[0], state.clients[0])
    data = jax.tree.map(lambda x: x[0], toy.make_data(toy.make_specs())[0])
    specs = toy.make_specs()
    ids = (jnp.arange(5), jnp.arange(3))
    download = method.broadcast(specs, jax.random.key(0), state.server, ids, state.round)[0]
    update = lambda *args: method.client_update(spec, *args, method.hyper, jnp.int32(1))
    _, upload, _ = jax.eval_shape(
        update, jax.random.key(0), toy.make_bases()[0], client, download, data
    )
    assert upload.signature is None
    assert (upload.middle.shape, upload.mask.shape) == ((3, 2, 4, 4), (3, 2, 4, 4))


def test_equal_ranks_start_with_the_same_block_and_smaller_ones_inside_it():
    specs = toy.make_specs()
    state = toy.start(h2.h2tune(shared_rank=8), specs)
    held = [
        np.asarray(triple.coordinates(clients.active[:, :, 0], spec.rank, 8))
        for spec, clients in zip(specs, state.clients)
    ]
    for coordinates in held:
        assert (coordinates == coordinates[:1, :1]).all()
    assert set(held[0][0, 0]) < set(held[1][0, 0])


def test_seeded_factors_are_columns_of_a_common_basis():
    narrow, _ = toy.make_specs()
    pruned = dataclasses.replace(
        narrow, name="pruned", rank=1, model=h2.ModelSpec(num_layers=1, sites={"q": (8, 8)}),
        targets=("q",),
    )  # fmt: skip
    method = h2.h2tune(basis="seeded", shared_rank=4)
    state = h2.init_round(method, (narrow, pruned), (None, None), None, jax.random.key(0))
    full, one = state.clients
    coordinate = triple.coordinates(one.active[0, 0], 1, 4)[0, 0]
    place = list(np.asarray(triple.coordinates(full.active[0, 0], 2, 4)[0])).index(coordinate)
    np.testing.assert_array_equal(one.a["q"][0, 0, :, 0], full.a["q"][3, 0, :, place])


def test_presets_change_by_keyword():
    assert make_options(h2.REFERENCE, {}) == h2.REFERENCE
    changed = make_options(h2.REFERENCE, {"selection": "block", "learning_rate": 0.1})
    assert changed.average == "selected"
    assert changed.shared_rate == changed.head_rate == 0.1
    assert changed.upload == "transpose"
    assert h2.h2tune(h2.REFERENCE).hyper.learning_rate == np.float32(2e-4)
    assert h2.PAPER.average == "all"
    assert make_options(h2.PAPER, {"selection": "block"}).average == "selected"


@pytest.mark.slow
def test_options_of_zero_terms_equal_terms_left_out():
    specs = toy.make_specs()
    args = toy.make_bases(), toy.make_data(specs), toy.EVERYONE, toy.EVERYONE
    out = []
    for value in (0.0, None):
        method = h2.h2tune(lambda_norm=value, lambda_keep=value, lambda_distil=value)
        state = toy.stir(toy.start(method))._replace(round=jnp.int32(1))
        out.append(h2.make_round(method, specs)(state, *args, method.hyper, toy.SEED)[0])
    toy.assert_trees_close(out[0], out[1])


def test_an_anchored_basis_carries_over_between_architectures():
    # The wide model is the narrow one in a rotated, larger space: its basis has to be too.
    method = h2.h2tune(basis="anchored", selection="leading", shared_rank=3)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(2, 400, 8))
    embed = np.linalg.qr(rng.normal(size=(12, 8)))[0].T
    specs = []
    for name, width, activations in (("a", 8, inputs), ("b", 12, inputs @ embed)):
        outputs = jnp.asarray(activations, jnp.float32)
        model = h2.ModelSpec(
            num_layers=2,
            sites={"q": (width, width)},
            site_activations_fn=lambda base, probe, x=outputs: {"q": (x, x)},
        )
        spec = toy.make_specs()[0]
        specs.append(dataclasses.replace(spec, name=name, model=model, targets=("q",)))
    state = h2.init_round(method, tuple(specs), (None, None), (None, None), jax.random.key(0))
    one, other = (clients.a["q"][0] for clients in state.clients)
    here = np.einsum("lnd,ldr->lnr", inputs, one)
    there = np.einsum("lnd,ldr->lnr", inputs @ embed, other)
    np.testing.assert_allclose(here, there, atol=0.1)
    for start in state.server.starts.values():
        np.testing.assert_allclose(start.fit["q"][0], 1, atol=1e-3)


def test_the_reference_of_an_anchored_basis_is_not_fitted_to_itself():
    # Fewer texts than coordinates: a fit would be arbitrary outside of what they span.
    found = []
    for seed in (0, 1):
        outputs = jax.random.normal(jax.random.key(seed), (2, 5, 8))
        model = h2.ModelSpec(
            num_layers=2,
            sites={"q": (8, 8)},
            site_activations_fn=lambda base, probe, x=outputs: {"q": (x, x)},
        )
        spec = dataclasses.replace(toy.make_specs()[0], model=model, targets=("q",))
        method = h2.h2tune(basis="anchored", core="pure", selection="leading", shared_rank=3)
        state = h2.init_round(method, (spec,), (None,), (None,), jax.random.key(0))
        ((columns, rows),) = (basis["q"] for basis in state.server.bases.values())
        np.testing.assert_allclose(columns.mT @ columns, np.eye(3)[None].repeat(2, 0), atol=1e-6)
        found.append((columns, rows))
    toy.assert_trees_equal(*found)

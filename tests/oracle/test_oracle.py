"""The oracle itself: its gradients against finite differences and numbers worked out by hand.

And its teeth: every setting of the grid changes its result by far more than the tolerances, so that an
implementation that ignored one would not pass.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import h2tune_jax as h2
from oracle import cores, h2tune, model
from oracle import test_two_rounds as rounds

RANK, SIZE, SLOTS = 2, 4, 3


def make_problem(name, **options):
    """Draw a client of one group in the middle of its training, and a batch."""
    rng = np.random.default_rng(5)
    group = rounds.GROUPS[name]
    kinds = tuple(kind for kind in rounds.KINDS if kind in group.sites)
    options = h2tune.Options(lambda_norm=0.5, lambda_keep=0.7, lambda_distil=1.3, **options)
    base = rounds.make_base(group, rng)
    cohort = h2tune.Cohort(kinds, tuple(range(len(kinds))), RANK, 1.5, base, 4, 1)
    draw = lambda *shape: 0.5 * rng.normal(size=shape)
    slots = SLOTS if options.upload == "gradient" else group.depth
    shared = {
        ("middle",): draw(slots, len(kinds), SIZE, SIZE),
        ("relation",): draw(slots, group.depth),
        ("scores",): None,
    }
    own = {("a", k): draw(group.depth, d, RANK) for k, (d, _) in group.sites.items()}
    own |= {("b", k): draw(group.depth, RANK, f) for k, (_, f) in group.sites.items()}
    own |= {("head", "w"): draw(group.width, group.classes), ("head", "b"): draw(group.classes)}
    index = np.stack(
        [[np.sort(rng.permutation(SIZE**2)[: RANK**2]) for _ in kinds] for _ in range(group.depth)]
    )
    batch = {key: rows[0, :3] for key, rows in rounds.make_examples(group, rng).items()}
    last = draw(group.depth, len(kinds), RANK, RANK)
    return cohort, options, shared, own, index, last, batch, draw


def slope(fn, params, path, direction, size=1e-5):
    """Return the central difference of `fn(params)` along a direction in one array."""
    at = lambda sign: fn({**params, path: params[path] + sign * size * direction})
    return (at(1) - at(-1)) / (2 * size)


@pytest.mark.parametrize("core", ["residual", "pure"])
@pytest.mark.parametrize("upload", ["gradient", "transpose"])
@pytest.mark.parametrize("name", rounds.GROUPS)
def test_gradient_of_shared_half_is_its_finite_difference(name, upload, core):
    cohort, options, shared, own, index, last, batch, draw = make_problem(
        name, selection="leading", upload=upload, core=core
    )
    evaluate = lambda shared: h2tune.shared_objective(
        cohort, options, shared, own, index, last, batch
    )
    grads = evaluate(shared)[2]
    for path in (("middle",), ("relation",)):
        for _ in range(3):
            direction = draw(*shared[path].shape)
            expected = slope(lambda s: evaluate(s)[0], shared, path, direction)
            assert (grads[path] * direction).sum() == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("core", ["residual", "pure"])
@pytest.mark.parametrize("average", ["positions", "batch"])
@pytest.mark.parametrize("name", rounds.GROUPS)
def test_gradient_of_own_half_is_its_finite_difference(name, average, core):
    cohort, options, shared, own, index, _, batch, draw = make_problem(
        name, distil_average=average, core=core
    )
    logits_1 = draw(*batch["y"].shape, rounds.GROUPS[name].classes)
    evaluate = lambda own: h2tune.own_objective(
        cohort, options, shared, own, index, logits_1, batch
    )
    grads = evaluate(own)[2]
    assert set(grads) == set(own)
    for path in own:
        direction = draw(*own[path].shape)
        expected = slope(lambda o: evaluate(o)[0], own, path, direction)
        assert (grads[path] * direction).sum() == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        # dL/dT * T is [[1*10, 2*20], [3*30, 4*40]] at places (1, 1), (1, 2), (2, 1), (2, 2).
        ("block", [0, 10 + 40 + 10 + 90, 90 + 160 + 40 + 160]),
        ("score", [[0, 0, 0], [0, 10, 40], [0, 90, 160]]),
    ],
)
def test_straight_through(selection, expected):
    index = np.array([[[4, 5, 7, 8]]])
    d_core, core = np.array([[[[1.0, 2], [3, 4]]]]), np.array([[[[10.0, 20], [30, 40]]]])
    options = h2tune.Options(selection=selection)
    found = h2tune.straight_through(options, d_core, core, index, 3)
    np.testing.assert_array_equal(found[0, 0], expected)


def test_ties_go_to_the_lower_index():
    np.testing.assert_array_equal(cores.largest(np.array([0.0, 1, -0.0, 0.0, 1]), 3), [0, 1, 4])


def test_norm_has_slope_zero_at_zero():
    length, slope_at_zero = h2tune.norm(np.zeros((2, 2)))
    assert length == 0
    np.testing.assert_array_equal(slope_at_zero, 0)


def test_divergence_of_two_logits():
    # softmax (1/2, 1/2) against (3/4, 1/4): KL = log(2 / sqrt 3)
    kl, slope_in_z = h2tune.divergence(np.zeros(2), np.log([3.0, 1.0]))
    assert kl == pytest.approx(np.log(2 / np.sqrt(3)))
    np.testing.assert_allclose(slope_in_z, [0.25, -0.25])


def test_network_is_the_same_in_both():
    group = rounds.GROUPS["wide"]
    case = rounds.Case()
    with jax.enable_x64(True):
        method, specs, bases, data, state = rounds.start(case, "float64")
        spec, base = specs[1], bases[1]
        client = jax.tree.map(lambda leaf: leaf[0], state.clients[1])
        sites = method.adapters(spec, state.server, client, None)
        batch = jax.tree.map(lambda leaf: leaf[0, :4], data[1].examples)
        whole = h2.Batch(batch, jnp.ones(4, bool))
        loss, _ = model.loss_fn(sites, base, whole, jax.random.key(0))
        zero = {kind: np.zeros((group.depth, group.rank, group.rank)) for kind in group.sites}
        numbers = rounds.as_numbers((base, client.a, client.b, client.head, batch))
    base, a, b, head, batch = numbers
    logits, _ = model.forward(
        base, a, zero, b, head, batch["x"], scale=group.alpha / group.rank, residual=True
    )
    assert model.cross_entropy(logits, batch)[0] == pytest.approx(float(loss), rel=1e-12)


TEETH = {
    "core": {"core": "pure"},
    "trained_scores": {"selection": "random"},
    "each_step": {"select_at": "step"},
    "frozen_factors": {"train_factors": False},
    "upload": {"upload": "transpose"},
    "jacobi": {"alternation": "jacobi"},
    "joint": {"alternation": "joint"},
    "no_warmup": {"warmup_rounds": 0},
    "two_warmups": {"warmup_rounds": 2},
    "average": {"average": "all"},
    "norm": {"lambda_norm": 0.55},
    "keep": {"lambda_keep": 11.0},
    "distil": {"lambda_distil": 1.43},
    "distil_average": {"distil_average": "batch"},
    "learning_rate": {"learning_rate": 0.021},
    "shared_rate": {"shared_rate": 0.051},
    "head_rate": {"head_rate": 0.041},
    "weight_decay": {"weight_decay": 0.1},
    "adam": {"adam": rounds.ADAM},
}


@pytest.fixture(scope="module")
def two_rounds():
    case = rounds.Case(rounds.RATES)
    _, _, bases, data, state = rounds.start(case, "float32")
    run = lambda options: rounds.run_oracle(case, state, bases, data, options)
    return run, rounds.make_options(case)


@pytest.mark.parametrize("name", TEETH)
def test_every_setting_shows(two_rounds, name):
    run, options = two_rounds
    changed = run(dataclasses.replace(options, **TEETH[name]))[-1]
    plain = run(options)[-1]
    gaps = [rounds.relative_error(changed[0], plain[0])]
    for cohort, cohort_ref in zip(changed[1], plain[1]):
        for client, client_ref in zip(cohort, cohort_ref):
            pair = client._replace(active=None), client_ref._replace(active=None)
            errors = jax.tree.map(rounds.relative_error, *(c._replace(trained=None) for c in pair))
            gaps += jax.tree.leaves(errors)
    assert max(gaps) > 10 * rounds.TOLERANCE["float32"]


def test_selection_moves_between_rounds(two_rounds):
    run, options = two_rounds
    first, second = run(options)
    for cohort, cohort_after in zip(first[1], second[1]):
        pairs = zip(cohort, cohort_after)
        assert any((client.active != after.active).any() for client, after in pairs)

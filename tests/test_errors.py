"""Bad input: an error that names the cohort and the field, before anything is compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import h2tune_jax as h2

JOINT = h2.h2tune(alternation="joint", lambda_norm=None)


def refuses(message, call, *args, **kwargs):
    with pytest.raises(h2.FederationError, match=message):
        call(*args, **kwargs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_clients": 0}, "cohort 'narrow': num_clients must be at least 1, got 0"),
        ({"rank": 0}, "cohort 'narrow': rank must be at least 1"),
        ({"rank": 2.5}, "cohort 'narrow': rank must be an int, got 2.5"),
        ({"dtype": "float31"}, "cohort 'narrow': dtype"),
        ({"dtype": "int32"}, "cohort 'narrow': dtype must be a floating type"),
        ({"kernels": "tritn"}, "cohort 'narrow': kernels.*did you mean 'triton'|allowed: auto"),
        ({"kernels": "triton", "dropout": 0.1}, "'triton' excludes adapter dropout"),
        ({"alpha": 0.0}, "cohort 'narrow': alpha must be positive"),
        ({"head_rate_factor": 0.0}, "cohort 'narrow': head_rate_factor must be positive"),
        ({"dropout": 1.0}, r"cohort 'narrow': dropout must lie in \[0, 1\)"),
        ({"targets": ("q", "upp")}, "cohort 'narrow': targets names 'upp'.*did you mean 'up'"),
    ],
)
def test_cohorts(changes, message):
    refuses(message, dataclasses.replace, toy.make_specs()[0], **changes)


def test_models_and_budgets():
    refuses("site 'q'", h2.ModelSpec, num_layers=1, sites={"q": (3, 0)})
    pairs = h2.ModelSpec(num_layers=1, sites=[("q", (3, 4))])
    assert pairs == h2.ModelSpec(num_layers=1, sites={"q": (3, 4)})
    refuses("num_layers must be", h2.ModelSpec, num_layers=0, sites={})
    refuses("exactly one of epochs and steps", h2.Budget, batch_size=2)
    refuses("exactly one of epochs and steps", h2.Budget, batch_size=2, epochs=1, steps=1)
    refuses("batch_size must be at least 1", h2.Budget, batch_size=0, epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selction": "block"}, "unknown option 'selction'.*did you mean 'selection'"),
        ({"selection": "blok"}, "selection: 'blok' is unknown.*did you mean 'block'"),
        ({"alternation": "gauss-seidel"}, "alternation.*did you mean 'gauss_seidel'"),
        ({"learning_rate": 0.0}, "learning_rate: must be positive, got 0.0"),
        ({"shared_rate": -1.0}, "shared_rate: must be positive"),
        ({"head_rate": float("nan")}, "head_rate: must be positive"),
        ({"weight_decay": -0.1}, "weight_decay: must be at least 0"),
        ({"shared_rank": 0}, "shared_rank: must be a whole number"),
        ({"shared_rank": 4.5}, "shared_rank: must be a whole number"),
        ({"learning_rate": "fast"}, "learning_rate: must be a number, got 'fast'"),
        ({"basis": "seeded", "selection": "score"}, "'seeded' excludes selection 'score'"),
        ({"basis": "seeded", "select_at": "step"}, "excludes select_at 'step'"),
        ({"basis": "seeded", "optimizer_state": "kept"}, "excludes optimizer_state 'kept'"),
    ],
)
def test_options(options, message):
    refuses(message, h2.h2tune, **options)


def test_local_and_fedavg_options():
    refuses("learning_rate: must be positive", h2.local, learning_rate=-1.0)
    refuses("optimizer_state.*did you mean 'kept'", h2.local, optimizer_state="keep")
    refuses("learning_rate: must be positive", h2.fedavg, learning_rate=0.0)
    spec = dataclasses.replace(toy.make_specs()[0], init_head_fn=None)
    refuses("cohort 'narrow': init_head_fn is missing", h2.make_round, h2.fedavg(), (spec,))
    refuses("cohort 'narrow': fedavg trains whole", h2.make_round, h2.fedavg(), toy.make_specs())
    spec = dataclasses.replace(toy.make_specs()[0], head_rate_factor=2.0)
    refuses("head_rate_factor must be 1, got 2.0", h2.make_round, h2.fedavg(), (spec,))


def test_federations():
    narrow, wide = toy.make_specs()
    refuses("expected a tuple of one CohortSpec", h2.make_round, JOINT, ())
    refuses("cohort 'narrow': name is used twice", h2.make_round, JOINT, (narrow, narrow))
    refuses(
        "cohort 'wide': rank 4 is above shared_rank R = 3",
        h2.make_round, h2.h2tune(shared_rank=3), (narrow, wide),
    )  # fmt: skip
    half = dataclasses.replace(wide, dtype="bfloat16")
    refuses("cohort 'wide': dtype bfloat16 differs", h2.make_round, JOINT, (narrow, half))
    none = dataclasses.replace(narrow, targets=())
    refuses("cohort 'narrow': targets is empty", h2.make_round, JOINT, (none, wide))
    refuses(
        "bases: expected one a cohort",
        h2.init_round, JOINT, (narrow, wide), (), None, jax.random.key(0),
    )  # fmt: skip


def test_cka_and_anchored_need_activations_and_a_probe():
    method, specs = h2.h2tune(relation="cka"), toy.make_specs()
    args = specs, toy.make_bases(), None, jax.random.key(0)
    refuses("relation 'cka' needs a probe", h2.init_round, method, *args)
    model = dataclasses.replace(specs[1].model, layer_outputs_fn=None)
    blind = specs[0], dataclasses.replace(specs[1], model=model)
    refuses(
        "cohort 'wide': relation 'cka' needs model.layer_outputs_fn", h2.make_round, method, blind
    )


@pytest.mark.parametrize(
    ("client_axis", "message"), [("vmp", "client_axis"), (0, "client_axis"), (True, "client_axis")]
)
def test_client_axis(client_axis, message):
    refuses(message, h2.make_round, JOINT, toy.make_specs(), client_axis=client_axis)


def test_mesh_needs_one_axis(cpu_devices):
    mesh = jax.sharding.Mesh(np.asarray(cpu_devices[:4]).reshape(2, 2), ("a", "b"))
    refuses("expected one .client. axis", h2.make_round, JOINT, toy.make_specs(), mesh=mesh)
    mesh = jax.make_mesh((4,), ("clients",), axis_types=(jax.sharding.AxisType.Explicit,))
    refuses("must be of type Auto", h2.make_round, JOINT, toy.make_specs(), mesh=mesh)


def test_evaluation():
    method, specs = h2.local(), toy.make_specs()
    evaluate = h2.make_evaluate(method, specs, batch_size=4)
    state, bases, data = toy.start(method), toy.make_bases(), toy.make_data(specs)
    refuses("data: expected a tuple of one entry", evaluate, state, bases, data[:1])
    cut = (jax.tree.map(lambda x: x[:2], data[0]), data[1])
    refuses("cohort 'narrow': data.examples must lead", evaluate, state, bases, cut)
    refuses("batch_size must be", h2.make_evaluate, method, specs, batch_size=0)


class TestArrays:
    """One field of a sound call is broken; the round is traced, not run."""

    def call(self, **changes):
        specs = changes.pop("specs", toy.make_specs())
        method = changes.pop("method", JOINT)
        fields = {
            "state": toy.start(method, specs),
            "bases": toy.make_bases(),
            "data": toy.make_data(specs),
            "client_ids": toy.EVERYONE,
            "weights": toy.EVERYONE,
            "hyper": method.hyper,
            "seed": toy.SEED,
        }
        fields |= changes
        jax.eval_shape(h2.make_round(method, specs), *fields.values())

    def test_sound(self):
        self.call()

    def test_ids(self):
        refuses("cohort 'narrow': client_ids must be", self.call, client_ids=(jnp.ones(2), None))
        many = jnp.zeros(9, jnp.int32)
        refuses("cohort 'wide': client_ids has 9 clients", self.call, client_ids=(None, many))
        refuses("client_ids: expected a tuple", self.call, client_ids=[None, None])
        refuses("'narrow': client_ids must be an array", self.call, client_ids=([0, 1], None))

    def test_weights(self):
        refuses("cohort 'wide': weights must be", self.call, weights=(None, jnp.ones(2)))
        refuses("weights: expected a tuple of one entry", self.call, weights=(None,))
        refuses("'wide': weights must be an array", self.call, weights=(None, [1, 1, 1]))

    def test_data(self):
        narrow, wide = toy.make_data(toy.make_specs())
        cut = jax.tree.map(lambda x: x[:2], wide)
        refuses("cohort 'wide': data.examples must lead", self.call, data=(narrow, cut))
        odd = wide._replace(examples={**wide.examples, "y": wide.examples["y"][:, :4]})
        refuses("cohort 'wide': data.examples must lead", self.call, data=(narrow, odd))
        counts = wide._replace(num_examples=jnp.ones(3))
        refuses("cohort 'wide': data.num_examples must be", self.call, data=(narrow, counts))
        empty = wide._replace(examples={})
        refuses("cohort 'wide': data.examples has no arrays", self.call, data=(narrow, empty))
        none = wide._replace(examples=jax.tree.map(lambda x: x[:, :0], wide.examples))
        refuses("cohort 'wide': data.examples has no room", self.call, data=(narrow, none))

        refuses("cohort 'wide': data must be ClientData", self.call, data=(narrow, wide.examples))

    def test_hyper(self):
        refuses("hyper: expected H2TuneHyper", self.call, hyper=h2.local().hyper)
        grid = JOINT.hyper._replace(learning_rate=jnp.ones(3))
        refuses("hyper.learning_rate: expected a scalar", self.call, hyper=grid)

    def test_state_of_other_clients(self):
        state = toy.start(JOINT)
        clients = (jax.tree.map(lambda x: x[:4], state.clients[0]), state.clients[1])
        refuses(
            "cohort 'narrow': state.clients leads", self.call, state=state._replace(clients=clients)
        )

    def test_a_site_that_the_model_asks_for_and_does_not_have(self):
        def asks(adapters, base, batch, key):
            return adapters.sites["gate"], {}

        narrow, wide = toy.make_specs()
        specs = (dataclasses.replace(narrow, loss_fn=asks), wide)
        refuses(
            "cohort 'narrow': client_update asks for site 'gate'.*adapted are q, up",
            self.call,
            specs=specs,
        )

    def test_a_field_that_the_examples_do_not_have(self):
        def asks(adapters, base, batch, key):
            return batch.examples["labels"], {}

        narrow, wide = toy.make_specs()
        specs = (narrow, dataclasses.replace(wide, loss_fn=asks))
        refuses("cohort 'wide': client_update asks for 'labels', a key", self.call, specs=specs)

    def test_a_site_of_the_wrong_shape(self):
        narrow, wide = toy.make_specs()
        model = h2.ModelSpec(num_layers=3, sites={"q": (12, 11)})
        specs = (narrow, dataclasses.replace(wide, model=model))
        refuses("cohort 'wide'.*site shapes do not fit", self.call, specs=specs)
        model = h2.ModelSpec(num_layers=2, sites={"q": (12, 12)})
        specs = (narrow, dataclasses.replace(wide, model=model))
        refuses("cohort 'wide'.*scan", self.call, specs=specs)

    def test_mixed_dtypes(self):
        bases = toy.make_bases()
        half = {**bases[1], "q": bases[1]["q"].astype(jnp.bfloat16)}
        refuses("cohort 'wide'.*mixed dtypes", self.call, bases=(bases[0], half))

    def test_metrics_that_are_not_scalars(self):
        def chatty(*args):
            loss, metrics = toy.loss_fn(*args)
            return loss, {**metrics, "scores": metrics["logits"]}

        narrow, wide = toy.make_specs()
        specs = (dataclasses.replace(narrow, loss_fn=chatty), wide)
        refuses("cohort 'narrow'.*metric 'scores' has shape", self.call, specs=specs)

    def test_distillation_without_logits(self):
        def terse(*args):
            return toy.loss_fn(*args)[0], {}

        narrow, wide = toy.make_specs()
        specs = (narrow, dataclasses.replace(wide, loss_fn=terse))
        refuses("cohort 'wide'.*no 'logits'", self.call, specs=specs, method=h2.h2tune())
        self.call(specs=specs, method=h2.h2tune(lambda_distil=None))

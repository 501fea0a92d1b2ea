"""What a run compiles: the same programs wherever clients live, so that all stores give the same bits."""

import copy
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from h2tune_jax.evaluate import make_evaluate
from h2tune_jax.method import FederatedMethod
from h2tune_jax.round import make_round, start_clients, start_server
from h2tune_jax.run.settings import RunConfig
from h2tune_jax.types import Array, FederationError, PyTree, Specs, fold_name

START_WIDTH = 8
"""How many clients are started by one call."""


class Programs:
    """The compiled functions of one run.

    Every one of them is given the clients that it works on, and no others; so it does not know where
    the others are.
    """

    def __init__(
        self, method: FederatedMethod, specs: Specs, bases: tuple, probe: Any, config: RunConfig
    ):
        self.method, self.specs = method, specs
        self.mesh = _make_mesh(config.engine.devices)
        self.bases = self._place_once(bases)
        self._settle(config.seed, probe)
        self.run_round = make_round(
            method,
            specs,
            client_axis=config.engine.client_axis,
            mesh=self.mesh,
            resident=False,
        )
        self._evaluation = config.evaluation
        self._axis = config.engine.client_axis
        self._made: dict[Any, Callable] = {}
        self._compiled: set[Any] = set()

    def with_seed(self, seed: int, probe: Any, *, compiled: bool = True) -> "Programs":
        """Return the same compiled functions for another seed's run.

        With `compiled=False` rounds count as not compiled yet: its data has other shapes.
        """
        other = copy.copy(self)
        other._settle(seed, probe)
        if not compiled:
            other._compiled = set()
        return other

    def _settle(self, seed: int, probe: Any) -> None:
        self.seed, self.probe = np.uint32(seed % 2**32), probe
        self.start_key = fold_name(jax.random.key(self.seed), "start")

    def place(self, tree: PyTree) -> PyTree:
        """Put arrays on the device, or on all devices of the mesh."""
        if self.mesh is None:
            return jax.device_put(tree)
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def _place_once(self, tree: PyTree) -> PyTree:
        """Put arrays where `place` puts them, one that stands at several places of the tree once.

        Not for what is given away to a round: nothing can be given away twice.
        """
        leaves, treedef = jax.tree.flatten(tree)
        distinct = {id(leaf): leaf for leaf in leaves}
        placed = dict(zip(distinct, self.place(list(distinct.values()))))
        return treedef.unflatten([placed[id(leaf)] for leaf in leaves])

    def compile_seconds(self, shape: Any, began: float) -> float | None:
        """Return the seconds since `began` where a round of this shape was compiled for the first time."""
        if shape in self._compiled:
            return None
        self._compiled.add(shape)
        return time.perf_counter() - began

    def start_server(self) -> PyTree:
        """Start the server."""
        server = start_server(self.method, self.specs, self.bases, self.probe, self.start_key)
        return self.place(server)

    def start_width(self, cohort: int) -> int:
        """Return how many clients `start_clients` starts: a client's bits depend on it."""
        return min(START_WIDTH, self.specs[cohort].num_clients)

    def start_clients(self, server: PyTree, cohort: int, ids: np.ndarray) -> PyTree:
        """Start the named clients, `start_width` of them."""
        assert len(ids) == self.start_width(cohort)
        return start_clients(
            self.method,
            self.specs,
            self.bases[cohort],
            server,
            cohort,
            jnp.asarray(ids, jnp.int32),
            self.start_key,
        )

    def client_shapes(self, server: PyTree) -> tuple[PyTree, ...]:
        """Return the shapes of one client of each cohort."""
        shapes = []
        for cohort in range(len(self.specs)):
            ids = np.zeros(self.start_width(cohort), np.int32)
            rows = jax.eval_shape(
                functools.partial(self.start_clients, cohort=cohort, ids=ids), server
            )
            shapes.append(
                jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)
            )
        return tuple(shapes)

    def server_shapes(self) -> PyTree:
        """Return the server's shapes without starting it."""
        return jax.eval_shape(
            lambda bases, probe: start_server(
                self.method, self.specs, bases, probe, self.start_key
            ),
            self.bases,
            self.probe,
        )

    def made(self, name: Any, make: Callable[[], Callable]) -> Callable:
        """Return a function of the run by name, made when it is first asked for."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def evaluate(self, moment: str) -> Callable[..., dict]:
        """Return the evaluation of given clients at a moment."""
        make = lambda: make_evaluate(
            self.method,
            self.specs,
            batch_size=self._evaluation.batch_size,
            moment=moment,
            client_axis=self._axis,
        )
        return self.made(("evaluate", moment), make)

    def adapt(self, steps: int) -> Callable[..., tuple]:
        """Return a round of so many steps that keeps the state it is given."""

        def make() -> Callable:
            specs = tuple(
                dataclasses.replace(
                    spec, budget=dataclasses.replace(spec.budget, epochs=None, steps=steps)
                )
                for spec in self.specs
            )
            return make_round(
                self.method, specs, client_axis=self._axis, resident=False, donate=False
            )

        return self.made(("adapt", steps), make)


def _make_mesh(devices: int | None) -> jax.sharding.Mesh | None:
    if devices is None or devices == 1:
        return None
    if devices > len(jax.devices()):
        raise FederationError(
            f"engine.devices: {devices} are asked for, and there are {len(jax.devices())}"
        )
    return jax.make_mesh(
        (devices,), ("clients",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


@jax.jit
def copy_tree(tree: PyTree) -> PyTree:
    """Copy arrays on the device, so that the originals may be given away."""
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def take_rows(tree: PyTree, ids: Array) -> PyTree:
    """Read rows: leaves [C, ...] -> [S, ...]."""
    if jax.default_backend() == "cpu":  # slices, where a gather would copy element by element
        row = lambda i: jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree
        )
        return jax.lax.map(row, ids)
    return jax.tree.map(lambda leaf: leaf.at[ids].get(mode="promise_in_bounds"), tree)


@functools.partial(jax.jit, static_argnums=1)
def repeat_row(tree: PyTree, count: int) -> PyTree:
    """Repeat the only row: leaves [1, ...] -> [count, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape[1:])), tree)


@functools.partial(jax.jit, donate_argnums=0)
def put_rows(tree: PyTree, rows: PyTree, source: Array, place: Array, count: Array) -> PyTree:
    """Write the first `count` of the rows `source` to the rows `place`; the tree is given away.

    `source` and `place` are padded at will, so that programs do not depend on how many there are.
    """
    if jax.default_backend() == "cpu":

        def write(i: Array, tree: PyTree) -> PyTree:
            return jax.tree.map(
                lambda leaf, new: jax.lax.dynamic_update_index_in_dim(
                    leaf, jax.lax.dynamic_index_in_dim(new, source[i], keepdims=False), place[i], 0
                ),
                tree,
                rows,
            )

        return jax.lax.fori_loop(0, count, write, tree)
    used = jnp.arange(place.shape[0], dtype=jnp.int32) < count

    def put(leaf: Array, new: Array) -> Array:
        at = jnp.where(used, place, leaf.shape[0])
        return leaf.at[at].set(new.at[source].get(mode="clip"), mode="drop")

    return jax.tree.map(put, tree, rows)

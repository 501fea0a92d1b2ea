"""The federation that the contract suite runs every method on, and what its tests of one method share.

Three cohorts: two of them of one architecture, of different tasks and, where that may be, ranks.
"""

import dataclasses
import functools

import jax
import numpy as np
import toy

import h2tune_jax as h2

NAMES = "narrow", "wide", "again"
ALL = np.arange(5), np.arange(3), np.arange(2)
NOBODY = (np.arange(0),) * 3
SOME = NOBODY[0], np.array([2, 0]), NOBODY[0]  # two cohorts are left out


@functools.cache
def make_specs(*, mixed, rank=None, targets=None):
    """`mixed`: ranks differ within an architecture; a `rank` is everyone's."""
    again = toy.cohort(
        "again", width=12, depth=3, rank=3 if mixed else 4, kinds=("q",), classes=3, num_clients=2
    )
    changes = {"targets": targets} | ({} if rank is None else {"rank": rank})
    return tuple(dataclasses.replace(spec, **changes) for spec in (*toy.make_specs(), again))


@functools.cache
def inputs():
    """Bases, data and public texts of all three cohorts."""
    bases, texts = toy.make_bases(), toy.probe()
    data = toy.make_data(make_specs(mixed=True))
    return jax.tree.map(np.asarray, ((*bases, bases[1]), data, (*texts, texts[1])))


def begin(method, specs):
    bases, _, texts = inputs()
    return h2.init_round(method, specs, bases, texts, jax.random.key(11))


@functools.cache
def usual_starts(mixed):
    """Local's clients, and FedIT's common factors."""
    local = begin(h2.local(), make_specs(mixed=mixed))
    fedit = begin(h2.fedit(), make_specs(mixed=False))
    return jax.tree.map(np.asarray, (local.clients, fedit.server.factors))


class Case:
    """One method, with all that is compiled and computed of it: once, however many tests look at it."""

    def __init__(self, name, method, specs):
        self.name, self.method, self.specs = name, method, specs
        self.traces, self._rounds, self._evaluations = 0, {}, {}

    def round_fn(self, client_axis="scan"):
        if client_axis not in self._rounds:

            def counting(*args):
                self.traces += 1
                return self.method.server_aggregate(*args)

            method = self.method._replace(server_aggregate=counting)
            self._rounds[client_axis] = h2.make_round(
                method, self.specs, client_axis=client_axis, donate=False
            )
        return self._rounds[client_axis]

    def run(self, state, *, ids=ALL, weights=None, data=None, hyper=None, axis="scan"):
        """Run one round; ids and weights are always arrays, so that one program serves many tests."""
        bases, all_data, _ = inputs()
        weights = tuple(np.ones(len(i)) for i in ids) if weights is None else weights
        out = self.round_fn(axis)(
            state,
            bases,
            all_data if data is None else data,
            tuple(np.asarray(i, np.int32) for i in ids),
            tuple(np.asarray(w, np.float32) for w in weights),
            self.method.hyper if hyper is None else hyper,
            toy.SEED,
        )
        return jax.tree.map(np.asarray, out)

    def evaluate(self, state, moment="trained"):
        if moment not in self._evaluations:
            self._evaluations[moment] = h2.make_evaluate(
                self.method, self.specs, batch_size=4, moment=moment
            )
        bases, data, _ = inputs()
        return self._evaluations[moment](state, bases, data)

    @functools.cached_property
    def fresh(self):
        return begin(self.method, self.specs)

    @functools.cached_property
    def started(self):
        return jax.tree.map(np.asarray, toy.stir(self.fresh))

    @functools.cached_property
    def two_rounds(self):
        """Everyone takes part in rounds 0 and 1: the states after each, and the metrics."""
        first, _ = self.run(self.started)
        second, metrics = self.run(first)
        assert metrics.rejected == dict.fromkeys(NAMES, 0)
        return first, second, metrics

    @functools.cached_property
    def some_again(self):
        """The second round with some only: the state after it, and the metrics."""
        return self.run(self.two_rounds[0], ids=SOME)

    @functools.cached_property
    def broadcast(self):
        """What is sent to everyone, as a program of server and round."""
        ids = tuple(np.asarray(i, np.int32) for i in ALL)
        return jax.jit(
            lambda server, round_index: self.method.broadcast(
                self.specs, jax.random.key(0), server, ids, round_index
            )
        )

    def models(self, read_fn, *, downloaded):
        """What `read_fn(download, adapters)` sees of every client, as a program of the state."""

        def everyone(state):
            seen = []
            downloads = self.broadcast(state.server, state.round)
            for spec, (common, personal), clients in zip(self.specs, downloads, state.clients):

                def one(client, personal, spec=spec, common=common):
                    download = h2.Download(common, personal)
                    sent = download if downloaded else None
                    return read_fn(download, self.method.adapters(spec, state.server, client, sent))

                each = jax.vmap(one, axis_size=spec.num_clients)  # some clients keep nothing
                seen.append(each(clients, personal))
            return tuple(seen)

        return jax.jit(everyone)

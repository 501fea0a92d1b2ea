"""FLoRA and FedEx-LoRA: base and adapter together are the exact mean of what clients trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import server as bench
import toy

import h2tune_jax as h2
from h2tune_jax import aggregate
from h2tune_jax.adapters import beside
from h2tune_jax.methods import ledger

WEIGHTS = [1.0, 0.0, 2.0], [3.0, 1.0], [1.0, 1.0]


def close(one, other):
    """Equal to 1e-5 of the largest entry."""
    scale = max(float(np.abs(other).max()), 1e-3)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("capacity", [None, 10, 31])  # 10: every round merges; 31: every third
@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_base_and_adapter_are_the_exact_mean_of_the_products(name, capacity):
    method = getattr(h2, name)(capacity=capacity)
    specs = bench.twins(ranks=(2, 5) if name == "flora" else (2, 2))
    if name == "flora" and capacity == 10:
        specs = bench.twins(ranks=(1, 2))
    server = bench.start(method, specs)
    folded = {kind: np.zeros((2, 8, 8)) for kind in ("q", "up")}
    for round_index in range(5):
        uploads = bench.uploads_of(specs, seed=round_index)
        if round_index == 3:  # nobody of the second cohort took part
            uploads = (uploads[0], None, uploads[2])
        server, _ = bench.aggregate(method, specs, server, uploads, WEIGHTS, round_index)
        for kind, before in folded.items():
            mean = bench.mean_delta(specs, (0, 1), uploads, WEIGHTS, kind)
            for place in (0, 1):
                site = bench.received(method, specs, server, place).sites[kind]
                # FedEx clients train the averages beside what is folded in; FLoRA's start anew.
                close(bench.delta(site), before + mean)
            adapter = dataclasses.replace(site, beside=None)
            folded[kind] = before + mean - bench.delta(adapter)
    assert all(int(account.used) > 0 for account in server.ledgers.values())


def test_flora_restarts_its_adapters_and_fedex_starts_from_averages():
    specs = bench.twins()
    uploads = bench.uploads_of(specs)
    for name in ("flora", "fedex_lora"):
        method = getattr(h2, name)()
        server, _ = bench.aggregate(method, specs, bench.start(method, specs), uploads, WEIGHTS)
        site = bench.received(method, specs, server, 0).sites["q"]
        own = bench.delta(dataclasses.replace(site, beside=None))
        assert (np.abs(own).max() > 0) == (name == "fedex_lora")


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_trained_client_stands_beside_what_it_was_sent(name):
    """Aggregation must not move the model that local training left."""
    method = getattr(h2, name)(capacity=10)
    specs = bench.twins()
    server = bench.start(method, specs)
    for round_index in range(4):
        uploads = bench.uploads_of(specs, seed=round_index)
        download = bench.downloads(method, specs, server)[0]
        client = method.init_client(specs[0], jax.random.key(0), None, download)
        there = beside.total(bench.received(method, specs, server, 0).sites["q"].beside)
        server, _ = bench.aggregate(method, specs, server, uploads, WEIGHTS, round_index)
        site = method.adapters(specs[0], server, client, None).sites["q"]
        close(beside.total(site.beside), there)
        np.testing.assert_array_equal(site.a, client.params["a"]["q"])


def test_the_order_of_clients_and_who_does_not_count_leave_no_trace():
    method, specs = h2.flora(), bench.twins()[:1]
    uploads = bench.uploads_of(specs)
    begin = bench.start(method, specs)
    after, _ = bench.aggregate(method, specs, begin, uploads, ([1.0, 0.0, 2.0],))
    ids = jnp.asarray([2, 0], jnp.int32)
    some = (jax.tree.map(lambda leaf: leaf[ids], uploads[0]),)
    rest = some, (jnp.asarray([2.0, 1.0]),), (ids,), jnp.zeros((), jnp.int32)
    again, _ = method.server_aggregate(specs, jax.random.key(1), begin, (None,), None, *rest)
    toy.assert_trees_equal(again, after)


def test_what_travels_down_is_what_the_last_round_brought():
    specs = bench.twins(ranks=(2, 5))
    method = h2.flora()
    server = bench.start(method, specs)
    account = server.ledgers[aggregate.architecture(specs[0])]
    assert int(ledger.news(account)) == 0
    server, _ = bench.aggregate(method, specs, server, bench.uploads_of(specs), WEIGHTS)
    account = server.ledgers[aggregate.architecture(specs[0])]
    # Two clients of rank 2 and two of rank 5 counted: 14 columns of two kinds, two layers, 8 + 8.
    assert int(ledger.news(account)) == 14 * 2 * 2 * 16


def test_a_round_that_does_not_fit_is_refused():
    specs = bench.twins()
    method = h2.flora(capacity=9)
    with pytest.raises(h2.FederationError, match="capacity 9 is below the 10 columns"):
        bench.aggregate(method, specs, bench.start(method, specs), bench.uploads_of(specs), WEIGHTS)
    with pytest.raises(h2.FederationError, match="optimizer_state 'restart'"):
        h2.flora(optimizer_state="kept")


def test_default_room_lies_between_one_and_four_dense_deltas():
    shapes = {"q": (8, 8), "up": (8, 24)}
    assert ledger.default_room(shapes, 1) == 4
    assert ledger.default_room(shapes, 9) == 9
    assert ledger.default_room(shapes, 10_000) == 16

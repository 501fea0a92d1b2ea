"""FLoRA and FedEx-LoRA: base and adapter together are the exact mean of what clients trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import server as bench
import toy

import h2tune_jax as h2
from h2tune_jax.adapters import beside
from h2tune_jax.methods import ledger
from h2tune_jax.methods.traffic import numbers

WEIGHTS = [1.0, 0.0, 2.0], [3.0, 1.0], [1.0, 1.0]


def close(one, other):
    """Equal to 1e-5 of the largest entry."""
    scale = max(float(np.abs(other).max()), 1e-3)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("capacity", [None, 10, 31])  # 10: every round merges; 31: every third
@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_base_and_adapter_are_the_exact_mean_of_the_products(name, capacity):
    method = getattr(h2, name)(capacity=capacity)
    # FLoRA's 16 columns are more than the smaller rooms hold, which hold any product of width 8.
    specs = bench.twins(ranks=(2, 5) if name == "flora" else (2, 2))
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


def sent_beside(download):
    """What stands beside the base, as a client is sent it."""
    return download.common if hasattr(download.common, "total") else download.common.beside


@pytest.mark.parametrize("capacity", [20, 9])  # room for two rounds of 8 columns that count, or one
@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_client_is_evaluated_beside_what_it_had(name, capacity):
    """Later rounds must not move the model that local training left, nor its own product count twice."""
    method = getattr(h2, name)(capacity=capacity)
    specs = bench.twins()
    server, trained = bench.start(method, specs), []
    rounds_apart = capacity // 8
    for round_index in range(5):
        sent = bench.downloads(method, specs, server)[0]
        client = method.init_client(specs[0], jax.random.key(round_index), None, sent)
        params = jax.tree.map(lambda leaf: leaf + 0.5, client.params)
        client = client._replace(params=params, had=sent_beside(sent).total)
        trained.append((client, beside.total(sent_beside(sent).sites["q"])))
        uploads = bench.uploads_of(specs, seed=round_index)
        server, _ = bench.aggregate(method, specs, server, uploads, WEIGHTS, round_index)

        now = bench.downloads(method, specs, server)[0]
        merged = int(sent_beside(now).merged)
        assert merged == round_index // rounds_apart * rounds_apart * 8
        for first, (old, there) in enumerate(trained):
            site = method.adapters(specs[0], server, old, None).sites["q"]
            if 0 < first * 8 < merged:  # its copy is gone: as right after a download
                fresh = method.adapters(specs[0], server, old, now).sites["q"]
                close(bench.delta(site), bench.delta(fresh))
            else:
                close(beside.total(site.beside), there)
                np.testing.assert_array_equal(site.a, old.params["a"]["q"])
                np.testing.assert_array_equal(site.b, old.params["b"]["q"])


def test_a_client_has_to_fetch_what_it_has_not_had():
    like = lambda *shape: beside.Beside(dense=jax.ShapeDtypeStruct(shape, jnp.float32))
    sites = {"q": like(2, 100, 60), "up": like(2, 40, 40)}
    fetched = lambda had, total, merged: int(
        numbers(
            ledger.fetched(ledger.LedgerDownload(sites, jnp.int32(merged), jnp.int32(total)), had)
        )
    )
    assert fetched(jnp.int32(30), total=30, merged=12) == 0
    assert fetched(jnp.int32(12), total=30, merged=12) == 18 * 2 * (160 + 80)
    # Of columns that were merged only the whole delta is left: of a newcomer, too.
    for had in (0, 11):
        assert fetched(jnp.int32(had), total=30, merged=12) == 2 * (100 * 60 + 40 * 40)
    # 37 columns of "q" are less than its delta, 38 more; of "up" it is 20.
    assert fetched(jnp.int32(0), total=37, merged=0) == 37 * 2 * 160 + 2 * 40 * 40
    assert fetched(jnp.int32(0), total=38, merged=0) == 2 * 100 * 60 + 2 * 40 * 40
    large = {kind: like(32, 4096, 11008) for kind in ("gate", "up", "down")}
    download = ledger.LedgerDownload(large, jnp.int32(0), jnp.int32(2900))
    count = numbers(ledger.fetched(download, jnp.int32(0)))
    assert int(count) == 3 * 2900 * 32 * (4096 + 11008) > 2**31


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_client_that_skipped_a_round_downloads_more(name):
    model = h2.ModelSpec(num_layers=2, sites={"q": (40, 60)})
    method = getattr(h2, name)(capacity=24)
    spec = dataclasses.replace(bench.twins()[0], model=model, targets=("q",), loss_fn=no_loss)
    server = bench.start(method, (spec,))
    data = h2.ClientData({"x": jnp.zeros((4, 1))}, jnp.int32(4))
    download = bench.downloads(method, (spec,), server)[0]
    client = method.init_client(spec, jax.random.key(0), None, download)
    factors = 2 * 2 * 100 if name == "fedex_lora" else 0
    columns = 0
    # Every round brings the columns of two clients of rank 2, and the client trains in these rounds:
    for round_index, takes_part in enumerate([True, False, False, True, True]):
        download = bench.downloads(method, (spec,), server)[0]
        if takes_part:
            given = spec, jax.random.key(1), None, client, download, data, method.hyper
            client, _, metrics = method.client_update(*given, jnp.zeros((), jnp.int32))
            assert int(metrics["numbers_down"]) == factors + columns * 2 * 100
            columns = 0
        columns += 4
        uploads = bench.uploads_of((spec,), seed=round_index)
        server, _ = bench.aggregate(method, (spec,), server, uploads, WEIGHTS[:1])


def no_loss(adapters, base, batch, key):
    return jnp.zeros(()), {}


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


def test_rounds_that_do_not_fit_are_refused():
    specs = bench.twins(ranks=(2, 5))
    for name in ("flora", "fedex_lora"):
        with pytest.raises(h2.FederationError, match="capacity"):
            getattr(h2, name)(capacity=0)
    # A single client's would not: known before anything runs.
    with pytest.raises(h2.FederationError, match="cohort 'second': capacity 4 is below its rank 5"):
        h2.flora(capacity=4).check(specs)
    with pytest.raises(h2.FederationError, match="cohort 'first': capacity 1 is below its rank 2"):
        h2.fedex_lora(capacity=1).check(bench.twins())
    # Some rounds would: known when one comes that does not.
    method = h2.flora(capacity=7)
    method.check(specs)
    with pytest.raises(h2.FederationError, match=r"capacity 7 is below the 16 columns.*or to 8,"):
        bench.aggregate(method, specs, bench.start(method, specs), bench.uploads_of(specs), WEIGHTS)
    with pytest.raises(h2.FederationError, match="optimizer_state 'restart'"):
        h2.flora(optimizer_state="kept")


def test_by_default_every_round_fits():
    for ranks, num_clients, room in (((1, 1), (3, 2), 5), ((2, 2), (3000, 2000), 8)):
        # As many columns as all bring, or as any product needs.
        opened = ledger.open_ledgers(bench.twins(ranks=ranks, num_clients=num_clients), None)
        assert next(iter(opened.values())).since.shape == (room,)
    (own, other), columns = ((8, 8), (8, 24)), {}
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for kind, (d, f) in {"q": own, "up": other, "down": other[::-1]}.items():
        columns[kind] = draw(2, d, 40), draw(2, 40, f)
    empty = lambda u, v: {"u": 0 * u[:, :, :8], "v": 0 * v[:, :8]}
    sites = {
        kind: beside.Beside(dense=draw(2, u.shape[1], v.shape[2]), **empty(u, v))
        for kind, (u, v) in columns.items()
    }
    none = jnp.int32(0)
    account = ledger.Ledger(sites, jnp.zeros(8, jnp.int32), none, none, none)
    after = ledger.append(account, columns, jnp.ones(40, bool))
    assert (int(after.total), int(after.used), int(after.merged)) == (40, 8, 0)
    for kind, (u, v) in columns.items():
        close(beside.total(after.sites[kind]), np.asarray(sites[kind].dense + u @ v))


def test_columns_that_do_not_count_take_no_room():
    rng = np.random.default_rng(0)
    u, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 6, 9), (1, 9, 6)))
    valid = jnp.asarray([0, 1, 0, 0, 1, 0, 0, 0, 1], bool)
    u = jnp.where(valid[None, None], u, 0)  # as `stack_products` gives them
    zeros = jnp.zeros((1, 6, 6))
    empty = beside.Beside(dense=zeros, u=zeros, v=zeros)
    none = jnp.int32(0)
    begin = ledger.Ledger({"q": empty}, jnp.zeros(6, jnp.int32), none, none, none)
    many = ledger.append(begin, {"q": (u, v)}, valid)
    few = ledger.append(begin, {"q": (u[:, :, valid], v[:, valid])}, jnp.ones(3, bool))
    toy.assert_trees_equal(many, few)
    assert int(many.used) == 3

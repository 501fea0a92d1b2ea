"""A server's account of what has been folded in beside the bases, and what each client has had of it.

The latest rounds stand in low-rank columns, in a buffer of fixed room that is merged into a dense delta
when it is full: shapes stay static however many rounds there are. While a round's columns stand apart, the
delta as it was before that round can still be told. Clients train beside the sum, so that a step costs
the same whatever the room.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax import aggregate
from h2tune_jax.adapters.beside import Beside, total
from h2tune_jax.methods.start import Parts
from h2tune_jax.methods.traffic import Units
from h2tune_jax.precision import exact
from h2tune_jax.types import Array, FederationError, PyTree, Specs, at_least_float32

Columns = dict[str, tuple[Array, Array]]  # by kind: [Li, D, W], [Li, W, F]


class Ledger(NamedTuple):
    """What stands beside one architecture."""

    sites: dict[str, Beside]  # by kind; Q columns, those in use first
    since: Array  # i32[Q], how many columns had come before the round that brought each
    used: Array  # i32[], columns in use
    merged: Array  # i32[], how many of the columns that ever came are in the dense deltas
    total: Array  # i32[], how many ever came


class LedgerDownload(NamedTuple):
    """What a cohort is sent of its architecture's ledger."""

    sites: dict[str, Beside]  # by kind: the sum, dense
    merged: Array  # i32[]
    total: Array  # i32[]


class LedgerClient(NamedTuple):
    """A client's parts as local training left them, and how much of the ledger it stands beside."""

    params: Parts
    opt: PyTree  # optimiser state where it is kept between rounds, else ()
    had: Array  # i32[], `total` at its last download


def check_room(method: str, specs: Specs, capacity: int | None) -> None:
    """Refuse a capacity that no round of some cohort would fit in."""
    for spec in specs:
        widest = _widest(spec.model.shapes[kind] for kind in spec.kinds)
        if capacity is not None and capacity < min(spec.rank, widest):
            raise FederationError(
                f"cohort {spec.name!r}: capacity {capacity} is below its rank {spec.rank}, so {method} "
                "has no room for a single one of its clients; give it room for all clients of a round "
                "(the sum of their ranks), or leave it out"
            )


def open_ledgers(specs: Specs, capacity: int | None) -> dict[str, Ledger]:
    """Start every architecture with nothing beside its base, and room for `capacity` columns.

    By default for as many as all its clients bring in a round, or, where that is less, for as many as
    any product needs (the smaller width of a site): no round is too large for it.
    """
    ledgers = {}
    for name, group in aggregate.architectures(specs).items():
        spec = specs[group[0]]
        shapes = {kind: spec.model.shapes[kind] for kind in spec.kinds}
        columns = sum(specs[place].num_clients * specs[place].rank for place in group)
        room = min(columns, _widest(shapes.values())) if capacity is None else capacity
        zeros = lambda *shape, spec=spec: jnp.zeros(
            (spec.model.num_layers, *shape), at_least_float32(spec.dtype)
        )
        sites = {
            kind: Beside(dense=zeros(d, f), u=zeros(d, room), v=zeros(room, f))
            for kind, (d, f) in shapes.items()
        }
        none = jnp.zeros((), jnp.int32)
        ledgers[name] = Ledger(sites, jnp.zeros(room, jnp.int32), none, none, none)
    return ledgers


def add_round(
    ledgers: dict[str, Ledger],
    specs: Specs,
    uploads: tuple,
    weights: tuple[Array, ...],
    client_ids: tuple[Array, ...],
    *,
    centres: dict[str, Parts] | None = None,
) -> dict[str, Ledger]:
    """Add what a round's clients sent: by architecture, the mean of their products.

    With `centres`, factors by architecture, the products are those of the differences from them.
    """
    after = dict(ledgers)
    for name, group in aggregate.architectures(specs).items():
        centre = None if centres is None else (centres[name]["a"], centres[name]["b"])
        stacked = aggregate.stack_products(
            specs, group, uploads, weights, client_ids, centre=centre
        )
        if stacked is not None:
            after[name] = append(ledgers[name], *stacked)
    return after


def append(
    ledger: Ledger,
    columns: Columns,
    valid: Array,  # bool[W]
) -> Ledger:
    """Add the product of the valid columns: behind those in use, or after merging these if full.

    What comes of it depends on the valid columns alone, not on how many others there are.
    """
    room, came = ledger.since.shape[0], valid.sum(dtype=jnp.int32)
    if valid.shape[0] > room:
        widest = _widest(site.dense.shape[-2:] for site in ledger.sites.values())
        if room < widest:
            raise FederationError(
                f"capacity {room} is below the {valid.shape[0]} columns that a round's clients bring "
                "together (the sum of their ranks); sample fewer of them, raise it to that, or to "
                f"{widest}, which any round fits in"
            )
        fitted = (functools.partial(form, room) for form in (_as_product, _first_valid))
        columns, valid = jax.lax.cond(came > room, *fitted, columns, valid)
    count = valid.sum(dtype=jnp.int32)
    ledger = jax.lax.cond(ledger.used + count > room, _merge, lambda same: same, ledger)
    order = jnp.cumsum(valid.astype(jnp.int32)) - 1
    places = jnp.where(valid, ledger.used + order, room)
    sites = {}
    for kind, old in ledger.sites.items():
        (u, v), (left, right) = _columns(old), columns[kind]
        sites[kind] = Beside(
            dense=old.dense,
            u=u.at[:, :, places].set(left.astype(u.dtype), mode="drop"),
            v=v.at[:, places, :].set(right.astype(v.dtype), mode="drop"),
        )
    since = ledger.since.at[places].set(ledger.total, mode="drop")
    return Ledger(sites, since, ledger.used + count, ledger.merged, ledger.total + came)


def _merge(ledger: Ledger) -> Ledger:
    """Put all columns into the dense deltas."""

    def merge(site: Beside) -> Beside:
        u, v = _columns(site)
        return Beside(dense=total(site), u=jnp.zeros_like(u), v=jnp.zeros_like(v))

    sites = {kind: merge(site) for kind, site in ledger.sites.items()}
    none = jnp.zeros_like(ledger.used)
    return Ledger(sites, jnp.zeros_like(ledger.since), none, ledger.total, ledger.total)


def _columns(site: Beside) -> tuple[Array, Array]:
    assert site.u is not None  # a ledger's sites have columns
    assert site.v is not None
    return site.u, site.v


def send(ledger: Ledger) -> LedgerDownload:
    """Merge what stands beside an architecture, once a round, for its clients to train beside."""
    sites = {kind: Beside(dense=total(site)) for kind, site in ledger.sites.items()}
    return LedgerDownload(sites, ledger.merged, ledger.total)


def as_had(ledger: Ledger, had: Array) -> tuple[dict[str, Beside], Array]:
    """Return what a client trained beside that last downloaded at `had`, and whether that is gone.

    It is gone (True) where columns that came later have been merged: then what stands beside the base is
    all that there is now.
    """
    gone = (had > 0) & (had < ledger.merged)
    part = gone | jnp.append(ledger.since < had, had > 0)

    def cut(site: Beside) -> Beside:
        parts = jnp.broadcast_to(part, (site.dense.shape[0], *part.shape))
        return Beside(dense=site.dense, u=site.u, v=site.v, part=parts)

    return {kind: cut(site) for kind, site in ledger.sites.items()}, gone


def fetched(download: LedgerDownload, had: Array) -> list[Units]:
    """Tell what a client has to be sent that had the ledger as it was at `had`.

    The columns that it has not had; or a site's whole delta, where that is less or where some of them
    have been merged.
    """
    missing = download.total - had
    parts = []
    for site in download.sites.values():
        layers, d, f = site.dense.shape
        most = d * f // (d + f)
        whole = (had < download.merged) | (missing > most)
        column = jax.ShapeDtypeStruct((layers, d + f), site.dense.dtype)
        parts += [Units(whole, site.dense), Units(jnp.where(whole, 0, missing), column, most)]
    return parts


def _widest(shapes: Iterable[tuple[int, ...]]) -> int:
    """The number of columns that suffices for every site's product."""
    return max(min(shape) for shape in shapes)


def _first_valid(room: int, columns: Columns, valid: Array) -> tuple[Columns, Array]:
    """Put the valid columns first and cut off what has no room behind them."""
    order = jnp.argsort(~valid, stable=True)[:room]
    return {kind: (u[:, :, order], v[:, order]) for kind, (u, v) in columns.items()}, valid[order]


@exact
def _as_product(room: int, columns: Columns, valid: Array) -> tuple[Columns, Array]:
    """Turn columns into `room` others with the same product: min(D, F) and an identity say it all."""

    def pair(u: Array, v: Array) -> tuple[Array, Array]:
        product = u @ v
        layers, d, f = product.shape
        eye = lambda rows, columns: jnp.broadcast_to(
            jnp.eye(rows, columns, dtype=product.dtype), (layers, rows, columns)
        )
        if d <= f:
            return eye(d, room), jnp.pad(product, ((0, 0), (0, room - d), (0, 0)))
        return jnp.pad(product, ((0, 0), (0, 0), (0, room - f))), eye(room, f)

    return {kind: pair(*both) for kind, both in columns.items()}, jnp.ones_like(valid[:room])

"""A server's account of what has been folded in beside the bases.

Low-rank contributions come as columns of a buffer of fixed room, which is merged into a dense delta
when it is full: shapes stay static however many rounds there are.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from h2tune_jax.adapters.beside import Beside, total
from h2tune_jax.aggregate import architectures
from h2tune_jax.types import Array, FederationError, Specs, at_least_float32


class Ledger(NamedTuple):
    """What stands beside one architecture; columns in use come first."""

    sites: dict[str, Beside]  # by kind
    used: Array  # i32[], columns in use
    sent: Array  # i32[], those of them that the last round's participants had


def open_ledgers(specs: Specs, capacity: int | None) -> dict[str, Ledger]:
    """Start every architecture with nothing beside its base, and room for `capacity` columns."""
    ledgers = {}
    for name, group in architectures(specs).items():
        spec = specs[group[0]]
        shapes = {kind: spec.model.shapes[kind] for kind in spec.kinds}
        columns = sum(specs[place].num_clients * specs[place].rank for place in group)
        room = capacity or default_room(shapes, columns)
        zeros = lambda *shape, spec=spec: jnp.zeros(
            (spec.model.num_layers, *shape), at_least_float32(spec.dtype)
        )
        sites = {
            kind: Beside(dense=zeros(d, f), u=zeros(d, room), v=zeros(room, f))
            for kind, (d, f) in shapes.items()
        }
        none = jnp.zeros((), jnp.int32)
        ledgers[name] = Ledger(sites, none, none)
    return ledgers


def default_room(shapes: dict[str, tuple[int, int]], columns: int) -> int:
    """Room for a round of so many columns, within one to four times what a dense delta costs."""
    dense = max(1, min(d * f // (d + f) for d, f in shapes.values()))
    return max(dense, min(columns, 4 * dense))


def append(
    ledger: Ledger,
    columns: dict[str, tuple[Array, Array]],  # by kind: [Li, D, W], [Li, W, F]
    valid: Array,  # bool[W]
) -> Ledger:
    """Add the product of the valid columns: behind those in use, or after merging these if full."""
    count = valid.sum(dtype=jnp.int32)
    room = next(iter(ledger.sites.values())).u.shape[-1]
    if valid.shape[0] > room:
        raise FederationError(
            f"capacity {room} is below the {valid.shape[0]} columns that a round's clients bring "
            "together (the sum of their ranks); raise it or sample fewer of them"
        )

    def merge(ledger: Ledger) -> Ledger:
        sites = {
            kind: Beside(dense=total(old), u=jnp.zeros_like(old.u), v=jnp.zeros_like(old.v))
            for kind, old in ledger.sites.items()
        }
        return ledger._replace(sites=sites, used=jnp.zeros_like(ledger.used))

    ledger = jax.lax.cond(ledger.used + count > room, merge, lambda same: same, ledger)
    order = jnp.cumsum(valid.astype(jnp.int32)) - 1
    places = jnp.where(valid, ledger.used + order, room)
    sites = {}
    for kind, old in ledger.sites.items():
        u, v = columns[kind]
        sites[kind] = Beside(
            dense=old.dense,
            u=old.u.at[:, :, places].set(u.astype(old.u.dtype), mode="drop"),
            v=old.v.at[:, places, :].set(v.astype(old.v.dtype), mode="drop"),
        )
    return Ledger(sites, ledger.used + count, sent=ledger.used)


def as_sent(ledger: Ledger) -> dict[str, Beside]:
    """Return what the last round's participants trained beside: without that round's own columns."""

    def cut(site: Beside) -> Beside:
        had = jnp.arange(site.u.shape[-1], dtype=jnp.int32) < ledger.sent
        return dataclasses.replace(site, u=jnp.where(had[None, None, :], site.u, 0))

    return {kind: cut(site) for kind, site in ledger.sites.items()}


def news(ledger: Ledger) -> Array:  # i32[]
    """Count the numbers that the last round added: what its participants have not had yet."""
    each = sum(
        site.u.shape[0] * (site.u.shape[1] + site.v.shape[2]) for site in ledger.sites.values()
    )
    return (ledger.used - ledger.sent) * each

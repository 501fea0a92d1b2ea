"""FedProx (Li et al. 2020, arXiv 1812.06127): a pull towards the download, for any method.

client objective + mu/2 |w - w_downloaded|^2,    w the shared part.
"""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp

from h2tune_jax.check import check_not_negative
from h2tune_jax.method import DriftFn, FederatedMethod
from h2tune_jax.types import Array, FederationError, PyTree, at_least_float32


def proximal(method: FederatedMethod, mu: float) -> FederatedMethod:
    """Wrap a method whose clients share something, so that the shared part is held to the download.

    The personal parts are not pulled. `hyper` gets a further field `proximal_mu`.
    """
    check_not_negative("mu", mu)
    if method.shared is None:
        raise FederationError(
            f"proximal: clients of {method.name!r} share nothing that could drift"
        )
    plain = type(method.hyper)
    if "proximal_mu" in plain._fields:
        raise FederationError(f"proximal: {method.name!r} has a proximal term already")
    hyper = _with_mu(plain)(*method.hyper, jnp.asarray(mu, jnp.result_type(float)))

    def client_update(
        spec, key, base, client, download, data, hyper, round_index, *, drift_fn=None
    ):
        pull = functools.partial(_pull, hyper.proximal_mu, drift_fn)
        args = spec, key, base, client, download, data, plain(*hyper[:-1]), round_index
        return method.client_update(*args, drift_fn=pull)

    return method._replace(name=f"{method.name}+proximal", hyper=hyper, client_update=client_update)


def _pull(mu: Array, further: DriftFn | None, now: PyTree, downloaded: PyTree) -> Array:
    """mu/2 |now - downloaded|^2, and what another wrapper asks for."""

    def squares(one: Array, other: Array) -> Array:
        return jnp.square((one - other).astype(at_least_float32(one.dtype))).sum()

    parts = jax.tree.leaves(jax.tree.map(squares, now, downloaded))
    dtype = jnp.result_type(*parts)
    term = 0.5 * mu.astype(dtype) * jnp.stack([part.astype(dtype) for part in parts]).sum()
    return term if further is None else term + further(now, downloaded).astype(dtype)


@functools.cache
def _with_mu(plain: type) -> Any:
    """The method's own settings and mu; one class a method, so that programs are found again."""
    return collections.namedtuple(plain.__name__, (*plain._fields, "proximal_mu"))

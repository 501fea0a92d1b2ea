"""The adapted product of one site: the frozen weight plus what a method adds to it.

This is the one function through which a model uses its adapters, so a model knows nothing of methods,
and kernels can take the product's place.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from h2tune_kernels import MAX_RANK, Kernels, triple_matmul
from h2tune_kernels.dispatch import resolve

from h2tune_jax.adapters import beside, triple
from h2tune_jax.adapters.beside import Beside
from h2tune_jax.adapters.dropout import drop
from h2tune_jax.types import Array, FederationError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteAdapter:
    """Low-rank factors beside a frozen weight: scale * ((x A) [+] (x A) T) B.

    Stacked over layers the arrays lead with [Li]; `jax.lax.scan` over layers strips that axis.
    A plain LoRA has no core. `beside` is a frozen delta that a server has folded in, unscaled.
    """

    a: Array  # T[Li, D, r]
    core: Array | None  # T[Li, r, r]
    b: Array  # T[Li, r, F]
    beside: Beside | None = None
    scale: float = dataclasses.field(metadata={"static": True})
    residual: bool = dataclasses.field(default=True, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    kernels: Kernels = dataclasses.field(default="auto", metadata={"static": True})

    def fold(self) -> tuple[Array, Array]:
        """Return an ordinary LoRA pair (a, b) with the same product.

        With a delta beside it the pair is wider: the delta is dense, and takes min(D, F) columns.
        """
        a, b = self.a, self.b
        if self.core is not None:
            a, b = triple.fold(a, self.core, b, residual=self.residual)
        if self.beside is None:
            return a, b
        delta = beside.total(self.beside) / self.scale
        layers, d, f = delta.shape
        eye = jnp.broadcast_to(jnp.eye(min(d, f), dtype=delta.dtype), (layers, *(min(d, f),) * 2))
        left, right = (eye, delta) if d <= f else (delta, eye)
        dtype = delta.dtype
        return (
            jnp.concatenate([left, a.astype(dtype)], axis=-1),
            jnp.concatenate([right, b.astype(dtype)], axis=-2),
        )


class SiteUpdate(Protocol):
    """What else may stand beside a frozen weight: a pytree that says what it adds to x W.

    Stacked over layers its leaves lead with [Li]. `key` switches dropout on.
    """

    def update(self, x: Array, key: Array | None = None) -> Array: ...  # T[..., D] -> T[..., F]


def adapted(
    x: Array,  # [..., D]
    w: Array,  # [D, F]
    site: SiteAdapter | SiteUpdate | None,
    *,
    bias: Array | None = None,  # [F]
    key: Array | None = None,
) -> Array:
    """Compute x W (+ bias) plus the site's adapter; `site=None` means an unadapted weight.

    `key` switches adapter dropout on; without one the product is deterministic.
    """
    if site is None:
        return _add_bias(x @ w, bias)
    if not isinstance(site, SiteAdapter):
        return _add_bias(x @ w + site.update(x, key), bias)
    form = {"scale": site.scale, "residual": site.residual}
    factors = site.a, site.core, site.b
    by_kernel = _takes_kernels(site)
    drops = site.dropout > 0 and key is not None
    if drops or site.beside is not None:
        entering = drop(x, site.dropout, key)
        frozen = x @ w if site.beside is None else beside.add(x, w, site.beside)
        y = frozen + triple.update(entering, *factors, **form)
    elif by_kernel:
        assert site.core is not None
        return triple_matmul(
            x, w, site.a, site.core, site.b, bias=bias, kernels=site.kernels, **form
        )
    else:
        y = triple.apply(x, w, *factors, **form)
    return _add_bias(y, bias)


def _add_bias(y: Array, bias: Array | None) -> Array:
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _takes_kernels(site: SiteAdapter) -> bool:
    if site.kernels == "triton":
        if site.core is None:
            raise FederationError("kernels 'triton': a plain LoRA has no core, and so no kernel")
        if site.beside is not None:
            raise FederationError("kernels 'triton': no kernel adds a delta beside the base")
        return True
    fits = site.core is not None and site.a.shape[-1] <= MAX_RANK
    return fits and resolve(site.kernels) != "xla"

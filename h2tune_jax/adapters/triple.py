"""Sparsified triple matrix decomposition (H2Tune, arXiv 2507.22633, section on rank-consistent matrices).

A site's update is dW = scale * A (I + T) B (`residual`) or scale * A T B (`pure`), where the core T is
r*r entries taken from a middle matrix M [R, R] that every client of the federation can hold, whatever
its width. All functions take any number of leading axes (layers, kinds) unless said otherwise.
"""

import jax
import jax.numpy as jnp

from h2tune_jax.precision import exact
from h2tune_jax.types import Array, FederationError, near_match

STRATEGIES = ("block", "leading", "score", "score_frozen", "magnitude", "random")
ENTRYWISE = ("score", "score_frozen", "magnitude", "random")
"""Strategies that take single entries; under them rows and columns of T carry no common meaning."""


def init(
    key: Array,
    num_layers: int,
    in_dim: int,
    out_dim: int,
    rank: int,
    *,
    residual: bool = True,
    dtype=jnp.float32,
) -> tuple[Array, Array]:
    """Draw the outer factors (a [Li, D, r], b [Li, r, F]) of one kind so that dW = 0 at the start.

    residual: A ~ U(+-1/sqrt D) (kaiming-uniform with a = sqrt 5), B = 0, as in LoRA.
    pure: B ~ U(+-1/sqrt F) as well; there T = 0 keeps dW at zero.
    """
    a_key, b_key = jax.random.split(key)
    a = uniform(a_key, (num_layers, in_dim, rank), in_dim, dtype)
    if residual:
        return a, jnp.zeros((num_layers, rank, out_dim), dtype)
    return a, uniform(b_key, (num_layers, rank, out_dim), out_dim, dtype)


def uniform(key: Array, shape: tuple[int, ...], fan: int, dtype) -> Array:
    """Draw from U(+-1/sqrt fan)."""
    bound = fan**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def select(
    scores: Array | None,  # [..., R] for block and leading, [..., R, R] else
    rank: int,
    *,
    strategy: str,
    middle: Array | None = None,  # [..., R, R]
    key: Array | None = None,
) -> Array:  # i32[..., r*r]
    """Choose which r*r entries of each middle matrix are active.

    Returns flat positions row * R + column, in ascending order. `block` takes the r coordinates of
    largest score and pairs them; `leading` the first r. `score` and `score_frozen` take the r*r
    entries of largest score, `magnitude` those of largest |middle|, `random` r*r drawn from `key`.
    Ties go to the lower index, and 0.0 ties with -0.0 (and with
    subnormal numbers, which XLA takes for zero). `leading` and `random` need only the shape of
    `scores` or `middle`.
    """
    if strategy not in STRATEGIES:
        raise FederationError(
            f"selection {strategy!r} is unknown; {near_match(strategy, STRATEGIES)}"
        )
    if strategy in ("block", "leading"):
        if strategy == "block" and scores is None:
            raise FederationError("selection 'block' needs scores [..., R]")
        if scores is not None:
            batch, size = scores.shape[:-1], scores.shape[-1]
        elif middle is not None:
            batch, size = middle.shape[:-2], middle.shape[-1]
        else:
            raise FederationError("selection 'leading' needs scores or middle for the shape")
        _check_rank(rank, size)
        if strategy == "leading":
            chosen = jnp.broadcast_to(jnp.arange(rank, dtype=jnp.int32), (*batch, rank))
        else:
            assert scores is not None
            chosen = _largest(scores, rank)
        return (chosen[..., :, None] * size + chosen[..., None, :]).reshape(*batch, rank * rank)

    if strategy == "magnitude":
        if middle is None:
            raise FederationError("selection 'magnitude' needs middle [..., R, R]")
        values = jnp.abs(middle)
    else:
        values = scores if scores is not None else middle
        if values is None or (scores is None and strategy != "random"):
            raise FederationError(f"selection {strategy!r} needs scores [..., R, R]")
        if strategy == "random":
            if key is None:
                raise FederationError("selection 'random' needs a key")
            values = jax.random.uniform(key, values.shape)
    size = values.shape[-1]
    _check_rank(rank, size)
    return _largest(values.reshape(*values.shape[:-2], size * size), rank * rank)


def _check_rank(rank: int, size: int) -> None:
    if not 1 <= rank <= size:
        raise FederationError(f"rank {rank} must lie between 1 and the shared rank R = {size}")


def _largest(values: Array, count: int) -> Array:
    """Positions of the `count` largest values, ascending; ties go to the lower position."""
    # top_k orders by bits, where -0.0 < 0.0; it already prefers lower positions among equals.
    comparable = jnp.where(values == 0, jnp.zeros_like(values), values)
    _, positions = jax.lax.top_k(comparable, count)
    return jnp.sort(positions.astype(jnp.int32), axis=-1)


def coordinates(index: Array, rank: int, size: int) -> Array:
    """Recover the sorted coordinates i32[..., r] from a `block` or `leading` index i32[..., r*r]."""
    return index[..., ::rank] // size


def core(middle: Array, index: Array, *, scores: Array | None = None) -> Array:
    """Gather the active entries of `middle` [..., R, R] into T [..., r, r].

    With `scores`, the straight-through gradient reaches them: selection has no derivative, so T is
    read as mask * M with mask = 1 at the selected entries, which gives dL/dT * M for entry scores
    [..., R, R]. For coordinate scores [..., R] the mask is the product of the row's and the column's,
    which gives the sum over the coordinate's row plus the sum over its column.
    """
    size, rank = middle.shape[-1], _side(index)
    taken = _take(middle.reshape(*middle.shape[:-2], size * size), index)
    if scores is not None:
        if scores.ndim == middle.ndim:
            gate = _zero_with_gradient(
                _take(scores.reshape(*scores.shape[:-2], size * size), index)
            )
        else:
            gate = _zero_with_gradient(_take(scores, index // size))
            gate = gate + _zero_with_gradient(_take(scores, index % size))
        taken = taken + jax.lax.stop_gradient(taken) * gate.astype(taken.dtype)
    return taken.reshape(*index.shape[:-1], rank, rank)


def _take(values: Array, index: Array) -> Array:
    return jnp.take_along_axis(values, index, axis=-1, mode="promise_in_bounds")


def _zero_with_gradient(x: Array) -> Array:
    return x - jax.lax.stop_gradient(x)


def _side(index: Array) -> int:
    rank = round(index.shape[-1] ** 0.5)
    if rank * rank != index.shape[-1]:
        raise FederationError(f"index must end in r*r positions, got shape {index.shape}")
    return rank


def scatter(core: Array, index: Array, size: int) -> Array:
    """Put T [..., r, r] back at its positions in zeros [..., R, R]: the transpose of `core`."""
    flat = core.reshape(*index.shape)
    rows = flat.reshape(-1, flat.shape[-1])
    place = jax.vmap(lambda v, i: jnp.zeros(size * size, v.dtype).at[i].set(v, unique_indices=True))
    out = place(rows, index.reshape(-1, index.shape[-1]))
    return out.reshape(*index.shape[:-1], size, size)


def update(
    x: Array,  # [..., D]
    a: Array,  # [D, r]
    core: Array | None,  # [r, r]; None for a plain LoRA
    b: Array,  # [r, F]
    *,
    scale: float | Array,
    residual: bool = True,
) -> Array:  # [..., F]
    """Compute what the adapter adds: scale * ((x A) + (x A) T) B, or scale * (x A) T B."""
    u = x @ a.astype(x.dtype)
    if core is not None:
        mixed = u @ core.astype(x.dtype)
        u = u + mixed if residual else mixed
    factor = scale if isinstance(scale, float) else jnp.asarray(scale, x.dtype)
    return factor * (u @ b.astype(x.dtype))


def apply(
    x: Array,  # [..., D]
    w: Array,  # [D, F]
    a: Array,  # [D, r]
    core: Array | None,  # [r, r]
    b: Array,  # [r, F]
    *,
    scale: float | Array,
    residual: bool = True,
) -> Array:  # [..., F]
    """Compute x W + scale * ((x A) [+] (x A) T) B in the dtype of x."""
    if w.shape != (a.shape[0], b.shape[-1]) or x.shape[-1] != w.shape[0]:
        raise FederationError(
            f"site shapes do not fit: x {x.shape}, w {w.shape}, a {a.shape}, b {b.shape}; "
            "declared widths (D, F) must be those of the weight, used as x @ w"
        )
    if x.dtype != w.dtype:
        raise FederationError(f"mixed dtypes: x is {x.dtype}, the frozen weight {w.dtype}")
    return x @ w + update(x, a, core, b, scale=scale, residual=residual)


@exact
def fold(a: Array, core: Array, b: Array, *, residual: bool = True) -> tuple[Array, Array]:
    """Return an ordinary LoRA pair with the same product: (A, (I + T) B), or (A, T B) for pure."""
    folded = core @ b
    return a, (b + folded if residual else folded)


def basis(
    key: Array,
    slots: Array,  # i32[Li], the shared slot nearest in depth to each layer
    width: int,
    size: int,
    dtype,
) -> Array:  # [Li, width, R]
    """Draw the `seeded` basis: one [width, R] matrix a slot, the same for every client of that width.

    Entries are U(+-1/sqrt width), so that the columns taken from it are what `init` would draw.
    """
    draw = lambda slot: uniform(jax.random.fold_in(key, slot), (width, size), width, dtype)
    return jax.vmap(draw)(slots)


def take_columns(basis: Array, chosen: Array) -> Array:
    """Take columns i32[..., r] of a basis [..., width, R]: -> [..., width, r]."""
    return jnp.take_along_axis(basis, chosen[..., None, :], axis=-1, mode="promise_in_bounds")


def realign(
    a: Array,  # [D, r]
    b: Array,  # [r, F]
    old: Array,  # i32[r], sorted coordinates that a and b stand for
    new: Array,  # i32[r], sorted coordinates that they shall stand for
    basis_a: Array,  # [D, R]
    basis_b: Array | None,  # [R, F]; None means that new rows of b start at zero
) -> tuple[Array, Array]:
    """Carry the factors of one site over to another choice of coordinates of a common basis.

    A coordinate that stays keeps its trained column and row, one that is new starts from the basis.
    """
    same = new[:, None] == old[None, :]
    stays, position = same.any(axis=1), same.argmax(axis=1)
    fresh_b = jnp.zeros_like(b) if basis_b is None else basis_b[new]
    return (
        jnp.where(stays[None, :], a[:, position], basis_a[:, new]),
        jnp.where(stays[:, None], b[position], fresh_b),
    )

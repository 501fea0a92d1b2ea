"""Server maths: sums and means over clients, with masks for what a client does not have.

Rules that need equal base shapes run once an architecture, over all of its cohorts, whatever their
tasks: `architectures` says which those are.
"""

import zlib

import jax
import jax.numpy as jnp

from h2tune_jax.precision import exact
from h2tune_jax.types import Array, CohortSpec, FederationError, PyTree, Specs, at_least_float32


def architecture(spec: CohortSpec) -> str:
    """Name the frozen base that a cohort adapts: its name, depth and the shapes of its sites."""
    shapes = zlib.crc32(repr(spec.model.sites).encode())
    return f"{spec.model.name or 'model'}-{spec.model.num_layers}-{shapes:08x}"


def architectures(specs: Specs) -> dict[str, tuple[int, ...]]:
    """Return the positions of each architecture's cohorts."""
    groups: dict[str, tuple[int, ...]] = {}
    for place, spec in enumerate(specs):
        groups[architecture(spec)] = (*groups.get(architecture(spec), ()), place)
    return groups


def check_alike(method: str, specs: Specs, fields: tuple[str, ...]) -> None:
    """Refuse cohorts of one architecture that differ in what the method needs to be equal."""
    for group in architectures(specs).values():
        first = specs[group[0]]
        for spec in (specs[place] for place in group[1:]):
            for field in fields:
                ours, theirs = getattr(spec, field), getattr(first, field)
                if ours != theirs:
                    raise FederationError(
                        f"cohort {spec.name!r}: {field} {ours!r} differs from {theirs!r} of cohort "
                        f"{first.name!r}; {method} averages clients of one architecture and needs "
                        f"them to have the same {field}"
                    )


def weighted_part(tree: PyTree, weight: Array, mask: PyTree | None = None) -> tuple[PyTree, PyTree]:
    """One client's summand of a weighted mean: (weight * mask * value, weight * mask).

    Without a mask the client counts everywhere. A mask has the structure of `tree`, and leaves that
    broadcast to its leaves. The parts are float32 or wider, whatever the dtype of the values.
    """
    if mask is None:
        mask = jax.tree.map(lambda leaf: jnp.ones((1,) * leaf.ndim, bool), tree)

    def weigh(leaf, mask):
        dtype = at_least_float32(leaf.dtype)
        share = weight.astype(dtype) * mask.astype(dtype)
        # where, not a product: what is masked out may be anything, infinities included.
        return jnp.where(share != 0, leaf.astype(dtype) * share, 0), share

    parts = jax.tree.map(weigh, tree, mask)
    return jax.tree.transpose(jax.tree.structure(tree), jax.tree.structure((0, 0)), parts)


def mean_or_keep(total: PyTree, share: PyTree, previous: PyTree) -> PyTree:
    """Divide summed parts; entries for which nobody counts keep their previous value."""

    def divide(total, share, previous):
        mean = total / jnp.where(share > 0, share, 1)
        return jnp.where(share > 0, mean.astype(previous.dtype), previous)

    return jax.tree.map(divide, total, share, previous)


def mean_by_architecture(
    specs: Specs, parts: tuple, previous: dict[str, PyTree]
) -> dict[str, PyTree]:
    """Take the weighted mean of each architecture's clients, over all of its cohorts.

    `parts` has, a cohort, the sum of its clients' `weighted_part`s, or None where nobody took part.
    """
    means = dict(previous)
    for name, group in architectures(specs).items():
        present = [parts[place] for place in group if parts[place] is not None]
        if present:
            total, share = jax.tree.map(lambda *leaves: sum(leaves), *present)
            means[name] = mean_or_keep(total, share, previous[name])
    return means


def sum_parts(uploads: PyTree, weights: Array) -> tuple[PyTree, PyTree]:
    """Return the sum of stacked clients' `weighted_part`s."""
    each = jax.vmap(weighted_part)(uploads, weights)
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), each)


def in_order(weights: Array, client_ids: Array) -> Array:  # i32[S]
    """Return the places of those who count, by id, and then of the others.

    Stacked in this order, what clients bring does not depend on the order that they came in.
    """
    last = jnp.iinfo(client_ids.dtype).max
    return jnp.argsort(jnp.where(weights > 0, client_ids, last))


def stack_products(
    specs: Specs,
    group: tuple[int, ...],
    uploads: tuple,
    weights: tuple[Array, ...],
    client_ids: tuple[Array, ...],
    *,
    centre: PyTree = None,
) -> tuple[dict[str, tuple[Array, Array]], Array] | None:
    """Stack an architecture's factors so that their product is sum_i s_i scale_i A_i B_i.

    Uploads hold "a" and "b" by kind, leaves [S, Li, ...]; s_i is the client's share of the weights.
    With a `centre` (A, B) the product is sum_i s_i scale_i (A_i - A)(B_i - B). Returns, by kind, the
    stacks (T[Li, D, W], T[Li, W, F]), and which of the W columns count (bool[W]); None where nobody of
    the architecture took part.
    """
    present = [place for place in group if uploads[place] is not None]
    if not present:
        return None
    total = sum(weights[place].sum() for place in present)
    stacks: dict[str, list[tuple[Array, Array]]] = {kind: [] for kind in specs[group[0]].kinds}
    valid = []
    for place in present:
        spec, order = specs[place], in_order(weights[place], client_ids[place])
        ordered = weights[place][order]
        valid.append(jnp.repeat(ordered > 0, spec.rank))
        share = spec.scale * ordered / jnp.where(total > 0, total, 1)
        for kind in spec.kinds:
            a, b = (uploads[place][part][kind][order] for part in ("a", "b"))
            a, b = (x.astype(at_least_float32(x.dtype)) for x in (a, b))
            if centre is not None:
                a, b = (x - c[kind].astype(x.dtype)[None] for x, c in zip((a, b), centre))
            a = a * share.astype(a.dtype)[:, None, None, None]
            clients, layers, width, rank = a.shape
            stacks[kind].append(
                (
                    jnp.moveaxis(a, 0, 2).reshape(layers, width, clients * rank),
                    jnp.moveaxis(b, 0, 1).reshape(layers, clients * rank, -1),
                )
            )
    joined = {
        kind: (
            jnp.concatenate([a for a, _ in parts], axis=2),
            jnp.concatenate([b for _, b in parts], axis=1),
        )
        for kind, parts in stacks.items()
    }
    return joined, jnp.concatenate(valid)


@exact
def product_norm(a: Array, b: Array) -> Array:
    """Frobenius norms of a [..., D, r] @ b [..., r, F] from the factors' Gram matrices: [...]."""
    a, b = (x.astype(at_least_float32(x.dtype)) for x in (a, b))
    squares = ((a.mT @ a) * (b @ b.mT)).sum(axis=(-2, -1))
    return jnp.sqrt(jnp.maximum(squares, 0))


@exact
def low_rank_svd(u: Array, v: Array, rank: int) -> tuple[Array, Array, Array]:
    """Singular vectors and values of u [D, W] @ v [W, F], without forming the product.

    QR of both stacks, SVD of the small core between them. Returns the `rank` largest (left [D, rank],
    values [rank], right [rank, F]), with zeros where the product has no more of them; the largest
    entry of each left vector is positive.
    """
    left, left_core = jnp.linalg.qr(u)
    right, right_core = jnp.linalg.qr(v.T)
    inner, values, outer = jnp.linalg.svd(left_core @ right_core.T, full_matrices=False)
    # Where the product has none, rounding leaves values below eps times the norms of u and v, whatever
    # the widths; that of the product may be far less than theirs.
    size = jnp.linalg.norm(left_core) * jnp.linalg.norm(right_core)
    floor = 4 * jnp.finfo(u.dtype).eps * size
    left, right = left @ inner, outer @ right.T
    peak = jnp.take_along_axis(left, jnp.abs(left).argmax(axis=0)[None, :], axis=0)[0]
    sign = jnp.where(peak < 0, -1, 1).astype(u.dtype)
    true = values > floor
    left = jnp.where(true[None, :], left * sign[None, :], 0)
    right = jnp.where(true[:, None], right * sign[:, None], 0)
    values = jnp.where(true, values, 0)
    grow = max(rank - values.shape[0], 0)
    pad = lambda x, axis: jnp.pad(x, [(0, grow if i == axis else 0) for i in range(x.ndim)])
    return pad(left, 1)[:, :rank], pad(values, 0)[:rank], pad(right, 0)[:rank]


def shares_of_alike(
    likeness: tuple[Array, ...],  # f32[C] a cohort: cosines, or distances negated
    weights: tuple[Array, ...],  # f32[C] a cohort
    temperature: float,
) -> tuple[Array, ...]:  # f32[C] a cohort
    """Weigh everyone by w_j exp(likeness_j / temperature), up to a factor that all have in common.

    The most alike of those who count has weight w_j, so nothing overflows; nobody who counts weighs less
    than e^-60 w_j, so something is left where only those who are far hold a part.
    """
    heard = [jnp.where(weight > 0, near, -jnp.inf) for near, weight in zip(likeness, weights)]
    top = jnp.concatenate(heard).max()
    top = jnp.where(jnp.isfinite(top), top, 0)
    share = lambda near, weight: (
        weight * jnp.exp(jnp.clip((near - top) / temperature, -60, 0).astype(weight.dtype))
    )
    return tuple(share(near, weight) for near, weight in zip(likeness, weights))


def note_latest(
    old: PyTree,  # leaves [C, ...], what each client of a cohort has last sent
    sent: PyTree,  # leaves [S, ...]
    client_ids: Array,  # i32[S]
    weights: Array,  # f32[S]
) -> PyTree:
    """Write what those who count have sent over what was there, for rules that remember clients."""

    def write(before: Array, new: Array) -> Array:
        # Out of range writes nothing: so it is for those who do not count.
        place = jnp.where(weights > 0, client_ids, before.shape[0])
        return before.at[place].set(new.astype(before.dtype), mode="drop")

    return jax.tree.map(write, old, sent)

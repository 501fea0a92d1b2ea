"""What H2Tune's server and clients hold, and what travels between them."""

from typing import NamedTuple

import numpy as np

from h2tune_jax import aggregate
from h2tune_jax.methods.h2tune.likeness import Signature
from h2tune_jax.methods.latest import Latest
from h2tune_jax.types import Array, CohortSpec, PyTree, Specs, order_kinds

Basis = dict[str, tuple[Array, Array | None]]  # by kind: T[Li, D, R], T[Li, F, R]


class Start(NamedTuple):
    """What a cohort's clients start from: drawn once, never changed, sent at first contact only."""

    relation: Array | None  # T[L, Li]; None where each client draws its own
    scores: Array | None  # T[Ki, R]; the common coordinate scores of `block`
    fit: dict[str, tuple[Array, Array | None]] | None  # how well an anchored basis fits: f32[Li]
    probe: Array | None  # f32[n, d], the first layer on public texts, where data say who is alike


class H2TuneServer(NamedTuple):
    """G, the starts of the cohorts, and the bases that their matrices stand in."""

    middle: Array  # T[L, K, R, R]; where clients get a mean of their own, what all start from
    starts: dict[str, Start]  # by cohort
    latest: tuple[Latest, ...] = ()  # a cohort, where clients get a mean of their own
    bases: dict[str, Basis] | None = None  # by `basis_name`; None where clients draw their factors


class H2TuneDownload(NamedTuple):
    """What a cohort is sent: G of its kinds; its start, and the basis that is one with it, stand beside it.

    Where clients get a mean of their own it is the personal part of the `Download`.
    """

    middle: Array  # T[L, Ki, R, R]
    start: Start
    basis: Basis | None


class H2TuneUpload(NamedTuple):
    """What leaves a client, and where it counts."""

    middle: Array  # T[L, Ki, R, R]
    mask: Array  # bool[L, Ki, R, R], or bool[L, 1, 1, 1] where all entries of a slot count
    signature: Signature | None = None  # of its data, where that says who is alike


class H2TuneClient(NamedTuple):
    """The personal state of one client. None of it but `H2TuneUpload` ever leaves."""

    a: dict[str, Array]  # by kind: T[Li, D, r]
    b: dict[str, Array]  # by kind: T[Li, r, F]
    head: PyTree
    relation: Array  # T[L, Li]
    scores: Array | None  # T[Li, Ki, R] (block) or T[Li, Ki, R, R]
    active: Array  # i32[Li, Ki, r*r], the last selection
    middle: Array  # T[Li, Ki, R, R], M at the end of the last local training
    copy: Array | None  # T[L, Ki, R, R], its own G, where nothing is shared
    trained: Array  # bool[], has the client ever taken part
    shared_opt: PyTree  # optimiser states where they are kept between rounds, else ()
    own_opt: PyTree


def basis_name(spec: CohortSpec) -> str:
    """Name what a basis depends on: cohorts that have it in common have one basis."""
    places = "" if spec.model.places is None else ",".join(map(str, spec.model.places.layers))
    return "/".join((aggregate.architecture(spec), places, *spec.kinds))


def basis_of(server: H2TuneServer, spec: CohortSpec) -> Basis | None:
    """Return a cohort's basis."""
    return None if server.bases is None else server.bases[basis_name(spec)]


def shared_kinds(specs: Specs) -> tuple[str, ...]:
    """Return the kinds of the federation in the order of G's axis K."""
    return order_kinds(kind for spec in specs for kind in spec.kinds)


def kind_places(specs: Specs, spec: CohortSpec) -> np.ndarray:
    """Return where a cohort's kinds stand on G's axis K."""
    kinds = shared_kinds(specs)
    return np.asarray([kinds.index(kind) for kind in spec.kinds])

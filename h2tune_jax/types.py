"""The words that the whole project shares: dimensions, specifications, and what moves in a round.

Dimension glossary (the letters beside array fields everywhere):

    C     clients of a cohort            S    clients of a cohort that take part in a round
    L     layer slots on the server      Li   layers of a cohort's model
    K     site kinds of the federation   Ki   site kinds of a cohort
    D, F  input and output width of a site's frozen weight, used as x @ W
    R     rank of the shared middle matrices       r    rank of a cohort's adapters
    n     examples that a client has room for      B    batch size
"""

import dataclasses
import difflib
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from h2tune_kernels import Kernels

Array = jax.Array
PyTree = Any
Metrics = Mapping[str, Any]

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
"""Site kinds in their canonical order; other names are welcome and follow in alphabetical order."""


class FederationError(ValueError):
    """Bad input, found before anything is compiled; the message names the cohort and the field."""


def order_kinds(kinds: Iterable[str]) -> tuple[str, ...]:
    """Sort kinds canonically, without repeats: `KINDS` first, then the others by name."""
    return tuple(
        sorted(set(kinds), key=lambda k: (KINDS.index(k) if k in KINDS else len(KINDS), k))
    )


def at_least_float32(dtype: Any) -> np.dtype:
    """Return the dtype to sum in: a 16-bit running sum of ones stops at 256."""
    narrow = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32
    return np.dtype(np.float32) if narrow else np.dtype(dtype)


def fold_name(key: Array, name: str) -> Array:
    """Fold a name into a key by a number that is the same everywhere and always."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))


def near_match(word: str, allowed: Iterable[str]) -> str:
    """Say what is allowed, and which of it the writer may have meant."""
    options = [str(a) for a in allowed]
    close = difflib.get_close_matches(str(word), options, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"allowed: {', '.join(options) or 'nothing'}{hint}"


class Places(NamedTuple):
    """Where a model's layers stand: layer l is number `layers[l]` of the `depth` of a whole model."""

    layers: tuple[int, ...]
    depth: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shapes of a model's adapted sites. Static and hashable.

    Attributes:
      num_layers: Li, the number of blocks.
      sites: for each kind the (D, F) of its frozen weight; any mapping or pairs, kept as pairs.
      layer_outputs_fn: (base, probe) -> [Li, n, d], one row a probe text; only H2Tune's `cka` relation
        and its `similarity="data"` ask for it, and `ce_lora`; the last two give it a client's examples.
      first_layer_fn: (base, probe) -> [n, d], the first layer's part of `layer_outputs_fn`, for those who
        can have it without the layers behind it: `similarity="data"` asks for no more. None: the first
        of all.
      site_activations_fn: (base, probe) -> {kind: (inputs [Li, n, D], outputs [Li, n, F])}, one row
        a probe text; only the `anchored` basis and `co_lora` ask for it.
      site_weights_fn: base -> {kind: [Li, D, F]}, the frozen weights as used in x @ W; only the
        `singular` basis asks for it.
      places: for a model cut from a deeper one, which of its layers these are; None means all.
      name: which frozen base this is. Cohorts whose models have one name and equal shapes are one
        architecture, whose clients some methods average; give different bases different names.
      width: d of what enters and leaves a block, where the loss function adds `sites["block"]` beside
        each block (`beside_block`); None says that it does not. Only `heterotune` and `ce_lora` ask.
    """

    num_layers: int
    sites: Any  # given as Mapping[str, tuple[int, int]]; kept as tuple[tuple[str, int, int], ...]
    layer_outputs_fn: Callable[[PyTree, PyTree], Array] | None = None
    first_layer_fn: Callable[[PyTree, PyTree], Array] | None = None
    site_activations_fn: Callable[[PyTree, PyTree], dict[str, tuple[Array, Array]]] | None = None
    site_weights_fn: Callable[[PyTree], dict[str, Array]] | None = None
    places: Places | None = None
    width: int | None = None
    name: str = ""

    def __post_init__(self):
        sites = self.sites
        if not isinstance(sites, Mapping):
            # Pairs (kind, (D, F)), or the triples that `sites` keeps.
            sites = {site[0]: site[1] if len(site) == 2 else site[1:] for site in sites}
        shapes = {kind: tuple(int(d) for d in shape) for kind, shape in sites.items()}
        for kind, shape in shapes.items():
            if len(shape) != 2 or min(shape) < 1:
                raise FederationError(f"site {kind!r}: expected (in, out) widths >= 1, got {shape}")
        if self.num_layers < 1:
            raise FederationError(f"num_layers must be at least 1, got {self.num_layers}")
        if self.places is not None:
            layers, depth = tuple(self.places[0]), self.places[1]
            object.__setattr__(self, "places", Places(layers, depth))
            if len(layers) != self.num_layers or not all(0 <= place < depth for place in layers):
                raise FederationError(
                    f"places: expected the places of {self.num_layers} layers below {depth}, got {layers}"
                )
        ordered = tuple((kind, *shapes[kind]) for kind in order_kinds(shapes))
        object.__setattr__(self, "sites", ordered)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The (D, F) of every kind, in canonical order."""
        return {kind: (d, f) for kind, d, f in self.sites}

    def first_layer(self, base: PyTree, probe: PyTree) -> Array:  # [n, d]
        """Return what leaves the first layer; for models that declare a function that says so."""
        if self.first_layer_fn is not None:
            return self.first_layer_fn(base, probe)
        assert self.layer_outputs_fn is not None  # refused by a method's `check`
        return self.layer_outputs_fn(base, probe)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a client trains in one round: so many epochs, or so many steps.

    `epochs` counts passes over the client's own examples: ceil(m / batch_size) steps each, so a
    client with 3 batches takes 3 steps. `steps` gives every client the same number of steps; its
    epochs follow each other for as long as that takes. Exactly one of the two is set.
    """

    batch_size: int
    epochs: int | None = None
    steps: int | None = None
    shuffle: bool = True

    def __post_init__(self):
        if (self.epochs is None) == (self.steps is None):
            raise FederationError("Budget: set exactly one of epochs and steps")
        for field in ("batch_size", "epochs", "steps"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise FederationError(f"Budget: {field} must be at least 1, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CohortSpec:
    """All clients of one architecture, rank and task shape. Static and hashable.

    Attributes:
      name: its name, unique in the federation; folded into the keys of its clients.
      num_clients: C.
      model: the shapes of the adapted sites.
      rank: r, what these clients can afford.
      loss_fn: (adapters, base, batch, key) -> (loss, metrics). See `docs/api.md`.
      budget: the local work of one round.
      targets: the kinds that are adapted; None means all that the model has.
      init_head_fn: key -> parameters of one client's task head; None means no head.
      head_rate_factor: multiplies the method's rate of task heads for this cohort.
      alpha: adapters are scaled by alpha / rank.
      dropout: adapter dropout rate, on the input of A.
      dtype: of every adapter parameter as it is held, sent and given to `loss_fn`; within a round 16 bits
        are trained in float32.
      kernels: what computes the adapted products: "auto" (Triton on CUDA where it is installed, XLA
        elsewhere), "triton" (an error where it cannot be had) or "xla".
    """

    name: str
    num_clients: int
    model: ModelSpec
    rank: int
    loss_fn: Callable[..., tuple[Array, Metrics]]
    budget: Budget
    targets: tuple[str, ...] | None = None
    init_head_fn: Callable[[Array], PyTree] | None = None
    head_rate_factor: float = 1.0
    alpha: float = 16.0
    dropout: float = 0.0
    dtype: Any = "float32"
    kernels: Kernels = "auto"

    def __post_init__(self):
        where = f"cohort {self.name!r}"
        if self.num_clients < 1:
            raise FederationError(
                f"{where}: num_clients must be at least 1, got {self.num_clients}"
            )
        for field in ("num_clients", "rank"):
            if not isinstance(getattr(self, field), int | np.integer):
                raise FederationError(
                    f"{where}: {field} must be an int, got {getattr(self, field)!r}"
                )
        if self.rank < 1:
            raise FederationError(f"{where}: rank must be at least 1, got {self.rank}")
        for field in ("alpha", "head_rate_factor"):
            if not getattr(self, field) > 0:
                raise FederationError(
                    f"{where}: {field} must be positive, got {getattr(self, field)}"
                )
        if not 0 <= self.dropout < 1:
            raise FederationError(f"{where}: dropout must lie in [0, 1), got {self.dropout}")
        if self.kernels not in get_args(Kernels):
            raise FederationError(
                f"{where}: kernels: {near_match(self.kernels, get_args(Kernels))}"
            )
        if self.kernels == "triton" and self.dropout > 0:
            raise FederationError(f"{where}: kernels 'triton' excludes adapter dropout")
        known = self.model.shapes
        kinds = tuple(known) if self.targets is None else tuple(self.targets)
        for kind in kinds:
            if kind not in known:
                raise FederationError(
                    f"{where}: targets names {kind!r}, a site that the model does not have; "
                    + near_match(kind, known)
                )
        object.__setattr__(self, "targets", order_kinds(kinds))
        try:
            dtype = np.dtype(self.dtype)
        except TypeError as error:
            raise FederationError(f"{where}: dtype: {error}") from error
        if not jnp.issubdtype(dtype, jnp.floating):
            raise FederationError(f"{where}: dtype must be a floating type, got {dtype}")
        object.__setattr__(self, "dtype", dtype)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The adapted kinds in canonical order: Ki of them."""
        assert self.targets is not None  # set in __post_init__
        return self.targets

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by: alpha / r."""
        return self.alpha / self.rank


Specs = tuple[CohortSpec, ...]


class ClientData(NamedTuple):
    """The examples of one client (without C), or of all clients of a cohort."""

    examples: PyTree  # leaves [C, n, ...]
    num_examples: Array  # i32[C], the rows beyond are padding


class Batch(NamedTuple):
    """What a loss function is given."""

    examples: PyTree  # leaves [B, ...]
    mask: Array  # bool[B]; False rows are padding and must not count


class Adapters(NamedTuple):
    """What a loss function sees of a client: all that is added to the frozen base."""

    sites: dict[str, Any]  # by kind; array leaves stacked over layers [Li, ...]
    head: PyTree  # the task head's parameters, or None


class Download(NamedTuple):
    """What the server sends to one cohort."""

    common: PyTree  # the same for each of its clients
    personal: PyTree  # leaves [S, ...]; inside client functions without S


class RoundState(NamedTuple):
    """All that a federation carries from one round to the next."""

    round: Array  # i32[]
    server: PyTree
    clients: tuple[PyTree, ...]  # one entry a cohort, leaves [C, ...]

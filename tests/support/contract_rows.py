"""The methods of the contract suite, and what every one of them says that it shares.

A new method joins by an entry in METHODS and in ROWS.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
import toy
from contract import make_specs

import h2tune_jax as h2
from h2tune_jax.adapters import beside


def stacked(method):
    """The same method without `reduce`: its server gets every upload."""

    def server_aggregate(specs, key, server, bases, probe, uploads, weights, ids, round_index):
        parts = []
        for spec, upload, weight in zip(specs, uploads, weights):
            part = None
            if upload is not None:
                each = jax.vmap(functools.partial(method.reduce, spec))(upload, weight)
                part = jax.tree.map(lambda leaf: leaf.sum(axis=0), each)
            parts.append(part)
        rest = weights, ids, round_index
        return method.server_aggregate(specs, key, server, bases, probe, tuple(parts), *rest)

    return method._replace(reduce=None, server_aggregate=server_aggregate)


METHODS = {
    "h2tune": lambda: h2.h2tune(learning_rate=0.02),
    "h2tune-transpose": lambda: h2.h2tune(
        learning_rate=0.02,
        upload="transpose",
        core="pure",
        selection="score",
        select_at="step",
        optimizer_state="kept",
    ),
    "h2tune-anchored": lambda: h2.h2tune(
        learning_rate=0.02, basis="anchored", core="pure", alternation="joint", relation="cka"
    ),
    "h2tune-reference": lambda: h2.h2tune(h2.REFERENCE, shared_rank=4, learning_rate=0.02),
    "h2tune-similar": lambda: h2.h2tune(
        learning_rate=0.02,
        core="parallel",
        basis="singular",
        selection="leading",
        sharing="similar",
        core_rank=4,
        relation="places",
        train_relation=False,
    ),
    "h2tune-alike": lambda: h2.h2tune(learning_rate=0.02, sharing="similar", similarity="data"),
    "h2tune-none": lambda: h2.h2tune(learning_rate=0.02, sharing="none"),
    "ce_lora": lambda: h2.ce_lora(learning_rate=0.02),
    "fedra": lambda: h2.fedra(learning_rate=0.02),
    "fed_hello": lambda: h2.fed_hello(
        learning_rate=0.02,
        allocation="combined",
        heads="shared",
        fim_warmup=1,
        fim_every=1,
        server_set=(*toy.server_set(), None),
    ),
    "co_lora": lambda: h2.co_lora(num_blocks=2, learning_rate=0.02),
    "heterotune": lambda: h2.heterotune(size=4, widths=(3, 2), learning_rate=0.02),
    "fedavg": lambda: h2.fedavg(learning_rate=0.3),
    "fedavg-stacked": lambda: stacked(h2.fedavg(learning_rate=0.3)),
    "local": lambda: h2.local(learning_rate=0.02, optimizer_state="kept"),
    "centralised": lambda: h2.centralised(learning_rate=0.02),
    "fedit": lambda: h2.fedit(learning_rate=0.02, optimizer_state="kept"),
    "ffa_lora": lambda: h2.ffa_lora(learning_rate=0.02),
    "fedsa_lora": lambda: h2.fedsa_lora(learning_rate=0.02),
    "hetlora": lambda: h2.hetlora(learning_rate=0.02, gamma=0.5),
    "flexlora": lambda: h2.flexlora(learning_rate=0.02),
    "flora": lambda: h2.flora(learning_rate=0.02),
    "fedex_lora": lambda: h2.fedex_lora(learning_rate=0.02),
    "fedit-proximal-adam": lambda: h2.server_optimizer(
        h2.proximal(h2.fedit(learning_rate=0.02), mu=0.1), optax.adam(0.05, eps=1e-3)
    ),
}


class Row(NamedTuple):
    """What a method's row in docs/methods.md says, in shapes and arrays."""

    upload: Callable  # spec -> shapes of one client's upload, masks apart
    # (download, adapters) -> what all of a cohort's clients have in common; None where each gets its
    # own, or nothing
    agrees: Callable | None
    private: tuple[str, ...] = ("head",)  # parts of a client's state that no upload depends on
    save: tuple[str, ...] = ()  # parts of the server's state that may depend on them all the same
    whole: bool = True  # all of the upload's numbers travel
    # spec -> shapes of one client's download; None: those of its upload. What is sent once, or only to
    # who has not got it, is not of a round; methods of which that is more have a test of their own.
    down: Callable | None = None
    counts_down: bool = True
    mixed: bool = False  # ranks may differ within an architecture
    # What a client starts from: "head" and "a" are `local`'s, "common a" is FedIT's; the rest is of the
    # method's own kind, or comes from the server.
    starts: tuple[str, ...] = ("head", "a")


def factors(*names):
    """Shapes of A and B by kind."""

    def shapes(spec):
        layers, rank = spec.model.num_layers, spec.rank
        of = {"a": lambda d, f: (layers, d, rank), "b": lambda d, f: (layers, rank, f)}
        return [of[name](*spec.model.shapes[kind]) for name in names for kind in spec.kinds]

    return shapes


def sites(*fields):
    """Read fields of the adapters' sites; of a delta beside the base its sum."""

    def read(download, adapters):
        found = [getattr(site, field) for site in adapters.sites.values() for field in fields]
        return [beside.total(leaf) if isinstance(leaf, beside.Beside) else leaf for leaf in found]

    return read


MODEL = lambda download, adapters: (sites("a", "b")(download, adapters), adapters.head)
EXAMPLES = lambda spec: [(10, toy.INPUT), (10,), (), (), (), ()]  # x, y, count, three settings
HEAD = lambda spec: [(spec.model.width, 2 if spec.name == "wide" else 3)]
ALL_LAYERS = lambda spec: [*factors("a", "b")(spec), (SOME_LAYERS(spec),)]  # and which to train
MIDDLE = lambda spec: [(3, len(spec.kinds), 4, 4)]
CORES = lambda spec: [(spec.model.num_layers, spec.rank, spec.rank) for _ in spec.kinds]
SOME_LAYERS = lambda spec: (spec.model.num_layers + 1) // 2
LAYERS = lambda spec: [
    *((SOME_LAYERS(spec), *shape[1:]) for shape in factors("a", "b")(spec)),
    (SOME_LAYERS(spec),),
]
BRANCH = lambda spec: [
    shape
    for _ in spec.kinds
    for others in [spec.model.num_layers - 2]
    for shape in [(2, 2, 2), (2, 2), *[(others, 12, 2), (others, 2, 12)] * others]
]
BRANCHES = {"narrow": (2, 3), "wide": (3, 5), "again": (3, 3)}  # slots, widths together
FACTORS = ("head", "'a'", "'b'")
ROWS = {
    "h2tune": Row(
        MIDDLE,
        lambda download, adapters: download.common.middle,
        private=("head", ".a[", ".b["),
        whole=False,
        mixed=True,
    ),
    "h2tune-alike": Row(
        lambda spec: [*MIDDLE(spec), (7,), ()],  # and the signature of 7 public texts
        None,
        private=("head", ".a[", ".b["),
        save=("signature",),  # of the data, whatever was trained
        whole=False,
        down=MIDDLE,
        mixed=True,
    ),
    "h2tune-none": Row(lambda spec: [], None, private=("head", ".a[", ".b[", "copy"), mixed=True),
    "fedavg": Row(HEAD, lambda download, adapters: adapters.head, private=(), starts=()),
    "local": Row(lambda spec: [], None, private=FACTORS, mixed=True),
    "centralised": Row(
        EXAMPLES,
        MODEL,
        private=(),
        whole=False,
        down=lambda spec: [*factors("a", "b")(spec), *HEAD(spec)],
        mixed=True,
        starts=(),
    ),
    "fedit": Row(factors("a", "b"), sites("a", "b"), private=FACTORS),
    "ffa_lora": Row(
        factors("b"), sites("a", "b"), private=("head", "'b'"), starts=("head", "common a")
    ),
    "fedsa_lora": Row(factors("a"), sites("a"), private=FACTORS),
    "hetlora": Row(
        factors("a", "b"),
        # Ranks prune themselves: one column is what all have.
        lambda download, adapters: [(s.a[..., :1], s.b[:, :1]) for s in adapters.sites.values()],
        private=FACTORS,
        whole=False,
        counts_down=False,
        mixed=True,
    ),
    "flexlora": Row(factors("a", "b"), sites("a", "b"), private=FACTORS, mixed=True),
    "flora": Row(
        factors("a", "b"), sites("beside"), private=FACTORS, counts_down=False, mixed=True
    ),
    "fedex_lora": Row(
        factors("a", "b"), sites("a", "b", "beside"), private=FACTORS, counts_down=False
    ),
    "heterotune": Row(
        lambda spec: [
            (slots, *shape)
            for slots, width in [BRANCHES[spec.name]]
            for shape in [(4, width), (width, 4)]
        ],
        lambda download, adapters: (adapters.sites["block"].inner, adapters.sites["block"].outer),
        private=("head", "'down'", "'up'"),
        mixed=True,
        starts=("head",),
    ),
    # The two that send every client a mean of its own.
    "ce_lora": Row(
        lambda spec: [*CORES(spec), (2, spec.model.width)],
        None,
        private=FACTORS,
        down=CORES,
        starts=("head", "common a"),
    ),
    "co_lora": Row(
        lambda spec: [*BRANCH(spec), *[(12,) for _ in spec.kinds]],  # and a sketch a kind
        None,
        private=("head", "'gate'"),
        save=("sketch",),  # of a gradient, which depends on all
        down=BRANCH,
        starts=("head",),
    ),
    "fedra": Row(LAYERS, sites("a", "b"), private=FACTORS, down=ALL_LAYERS),
    "fed_hello": Row(
        lambda spec: [*LAYERS(spec), *HEAD(spec)],
        MODEL,
        private=FACTORS,
        down=lambda spec: [*ALL_LAYERS(spec), *HEAD(spec)],
    ),
}
"""By a method's name in METHODS, or the first word of it."""


def row_of(name):
    row = ROWS.get(name) or ROWS[name.split("-")[0]]
    # The anchored basis gives A, too; with a mean for each client, what all are sent never changes.
    changes = {"h2tune-anchored": {"starts": ("head",)}, "h2tune-similar": {"agrees": None}}
    return row._replace(**changes.get(name, {}))


def specs_of(name):
    row, first = row_of(name), name.split("-")[0]
    # P and Q of Co-LoRA have one shape for all; FedAvg trains what `init_head_fn` makes, and no sites.
    rank, targets = 2 if first == "co_lora" else None, () if first == "fedavg" else None
    return make_specs(mixed=row.mixed, rank=rank, targets=targets)

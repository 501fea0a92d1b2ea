"""The inside of a method: layer relations, selected entries, and how alike clients are."""

from collections.abc import Callable, Sequence

import numpy as np

from h2tune_jax.run import numbers
from h2tune_jax.run.report import arrays as inside
from h2tune_jax.run.report.arrays import Inside, Relations
from h2tune_jax.run.report.html import Html, details, figure, grid, join, note, table, tag
from h2tune_jax.run.report.page import Section
from h2tune_jax.run.report.svg import heat_map
from h2tune_jax.run.report.view import RunView

MOST_GROUPS = 12
MOST_CLIENTS = 24
MOST_NUMBERS = 40
_KIND_NAMES = "q, k, v, o: attention; gate, up, down: the block's other products"


def inside_section(view: RunView, read: Inside | None, why: str) -> Section:
    """Build what is known of one run's inside from its newest good checkpoint.

    `why` is said where there are no arrays.
    """
    title, anchor = f"Inside {view.label}", f"inside-{_slug(view.label)}"
    if read is None:
        text = f"Layer relations, selected entries and similarities are left out: {why}"
        return Section(anchor, title, note(text))
    found = {
        group.name: relations
        for place, group in enumerate(view.groups)
        if (relations := inside.relations_of(read.arrays, place)) is not None
        and len(relations.trained)
    }
    when = f"From the checkpoint of round {read.rounds:,}"
    if read.is_sample:
        when += f"; of each group's clients that have trained, at most {inside.MOST_CLIENTS}"
    said = note(when + ".")
    similarity = [tag("h3", "Similarity between clients"), _similarity(view, read, found)]
    if not found:
        text = (
            f"Method {view.method} keeps no layer relations and selects no entries of middle matrices, "
            "so neither is drawn."
        )
        return Section(anchor, title, join([said, note(text), *similarity]))
    parts = [
        said, tag("h3", "Layer relations"), _relations(found),
        tag("h3", "Selected entries of the middle matrices"), _selection(found),
        *similarity,
    ]  # fmt: skip
    return Section(anchor, title, join(parts))


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower())


def _present(relations: Relations) -> np.ndarray:
    """Clients that have trained; all of them where none has."""
    trained = np.flatnonzero(relations.trained)
    return trained if len(trained) else np.arange(len(relations.trained))


def _relations(found: dict[str, Relations]) -> Html:
    figures, tables = [], []
    for name, relations in list(found.items())[:MOST_GROUPS]:
        chosen = relations.relation[_present(relations)]  # [c, L, Li]
        mean, spread = chosen.mean(axis=0), float(np.ptp(chosen, axis=0).max())
        if len(chosen) == 1:
            about = "one client"
        elif spread == 0:
            about = f"the same for all {len(chosen):,} clients"
        else:
            about = f"mean of {len(chosen):,} clients; they differ by at most {spread:.2g}"
        chart = heat_map(
            f"layer relation of group {name}", mean, row_label="shared slot", column_label="layer"
        )
        figures.append(figure(chart, join([name, tag("small", f" {about}")])))
        if max(mean.shape) <= MOST_NUMBERS:
            header = ["slot", *(f"layer {i}" for i in range(mean.shape[1]))]
            rows = [[i, *(f"{x:.2f}".replace("-", "−") for x in row)] for i, row in enumerate(mean)]
            tables.append(table(header, rows, caption=name))
    said = note(
        "P says how much of each shared slot a layer of the client reads: M[layer] = sum over slots of "
        "P[slot, layer] G[slot]. Blue is positive, orange negative."
    )
    numbers_too = details("The matrices in numbers", join(tables)) if tables else None
    return join([said, grid(*figures), _more(found), numbers_too])


def _selection(found: dict[str, Relations]) -> Html:
    figures, rows = [], []
    shares = {
        name: inside.selected_share(relations, _present(relations))
        for name, relations in list(found.items())[:MOST_GROUPS]
    }
    reached = {
        (name, kind): share[place] > 0
        for name, share in shares.items()
        for place, kind in enumerate(found[name].kinds)
    }
    for name, share in shares.items():
        if (share >= 1).all():
            continue  # the table says it
        for place, kind in enumerate(found[name].kinds):
            chart = heat_map(
                f"selected entries of group {name}, kind {kind}", share[place],
                row_label="row of M", column_label="column of M", limit=1.0,
            )  # fmt: skip
            figures.append(figure(chart, join([name, tag("small", f" kind {kind}")])))
    for name, kind in reached:
        place, own = found[name].kinds.index(kind), reached[name, kind]
        others = [r for (n, k), r in reached.items() if k == kind and n != name]
        common = numbers.MISSING
        if others and own.any():
            common = numbers.share(float((own & np.any(others, axis=0)).sum() / own.sum()))
        rows.append([
            f"{name}, {kind}", own.size, found[name].active.shape[-1], int(own.sum()),
            int((shares[name][place] >= 1).sum()), common,
        ])  # fmt: skip
    whole = [name for name, share in shares.items() if (share >= 1).all()]
    all_of = None
    if whole:
        all_of = note(
            f"Not drawn: {', '.join(whole)}, whose rank is the shared rank, so that every entry is "
            "active in every layer of every client."
        )
    said = note(
        "How often each entry of the middle matrices is among a client's active ones, over the layers "
        f"and clients of a group: full colour is always, empty is never. Kinds are sites ({_KIND_NAMES})."
    )
    header = ["group, kind", "entries of M", "active in a layer", "reached in any", "reached in all",
              "by other groups too"]  # fmt: skip
    return join([said, grid(*figures), all_of, _more(found), table(header, rows)])


def _more(found: dict[str, Relations]) -> Html | None:
    if len(found) <= MOST_GROUPS:
        return None
    return note(f"The first {MOST_GROUPS} of {len(found)} groups are drawn.")


def _similarity(view: RunView, read: Inside, found: dict[str, Relations]) -> Html:
    """Compare clients; each is known by its group's place and its own place in that group's arrays."""
    if found:
        places = [place for place, group in enumerate(view.groups) if group.name in found]
        own = {place: found[view.groups[place].name] for place in places}
        picked = _pick({place: _present(relations) for place, relations in own.items()})
        slots = [inside.read_back(own[place], client) for place, client in picked]
        compare = lambda i, j: inside.cosine_of_slots(slots[i], slots[j])
        said = (
            "Cosine between clients of what they share: each client's own middle matrices M after its "
            "last local training, brought to the shared slots by its own P (sum over layers of "
            "P[slot, layer] M[layer]), over the kinds that both clients have."
        )
    else:
        factors = [inside.factors_of(read.arrays, place) for place in range(len(view.groups))]
        held = {
            place: np.arange(len(next(iter(own.values())).a))
            for place, own in enumerate(factors)
            if own
        }
        picked = _pick(held)
        if not picked:
            return note(
                f"The clients of {view.label} keep no low-rank factors of their own, so there is "
                "nothing to compare between them."
            )
        compare = _cosine_of_updates(factors, picked)
        said = (
            "Cosine between clients of what they hold: their updates A B of the frozen weights, over "
            "all layers and sites. Only clients whose models have equal shapes are compared; the rest "
            "is grey."
        )
    matrix = _fill(len(picked), compare)
    names = [
        view.groups[place].client_name(int(read.clients[place][client])) for place, client in picked
    ]
    total = sum(len(group.clients) for group in view.groups)
    shown = heat_map(
        f"similarity between clients of {view.label}", matrix, row_label="client",
        column_label="client", limit=1.0,
    )  # fmt: skip
    of_all = f"{len(picked)} of {total:,} clients" if len(picked) < total else "all clients"
    cosine = lambda x: f"{x:.2f}".replace("-", "−") if np.isfinite(x) else numbers.MISSING
    rows = [[f"{i}: {name}", *map(cosine, row)] for i, (name, row) in enumerate(zip(names, matrix))]
    listing = table(["client", *range(len(names))], rows)
    return join([note(said), grid(figure(shown, of_all)), details("In numbers", listing)])


def _pick(held: dict[int, np.ndarray]) -> list[tuple[int, int]]:
    """Choose the clients that are shown, evenly spaced in each group: (the group's place, their own)."""
    most = max(MOST_CLIENTS // max(len(held), 1), 1)
    return [
        (place, int(client))
        for place, clients in list(held.items())[:MOST_CLIENTS]
        for client in inside.spaced(clients, most)
    ]


def _cosine_of_updates(
    factors: Sequence[dict], chosen: Sequence[tuple[int, int]]
) -> Callable[[int, int], float]:
    lengths = [inside.update_products(factors[p], c, factors[p], c) for p, c in chosen]

    def compare(i: int, j: int) -> float:
        (p, c), (q, d) = chosen[i], chosen[j]
        if not inside.comparable(factors[p], factors[q]) or min(lengths[i], lengths[j]) <= 0:
            return np.nan
        dot = inside.update_products(factors[p], c, factors[q], d)
        return dot / float(np.sqrt(lengths[i] * lengths[j]))

    return compare


def _fill(count: int, compare: Callable[[int, int], float]) -> np.ndarray:
    matrix = np.full((count, count), np.nan)
    for i in range(count):
        for j in range(i + 1):
            matrix[i, j] = matrix[j, i] = compare(i, j)
    return matrix

"""HTML by functions. Text is escaped where it enters, unless it is known to be markup."""

import html
from collections.abc import Iterable, Sequence

_VOID = frozenset({"meta", "br", "hr", "path", "line", "circle", "rect", "polyline"})


class Html(str):
    """Text that is markup already. Everything else is escaped by `tag`."""

    __slots__ = ()


def safe(value: object) -> Html:
    """Return markup as it is, and anything else escaped."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Build an element; its children and attribute values are escaped.

    An attribute's trailing underscore is dropped and the others are hyphens (`class_`,
    `stroke_width`); attributes that are None or False are left out, True stands without a value.
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    head = " ".join(parts)
    if name in _VOID:
        return Html(f"<{head}/>" if name not in ("meta", "br", "hr") else f"<{head}>")
    return Html(f"<{head}>{join(children)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """Concatenate, leaving out None."""
    return Html(between.join(safe(part) for part in parts if part is not None))


def note(text: object) -> Html:
    """Write a sentence of explanation."""
    return tag("p", text, class_="note")


def table(
    header: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str | None = None
) -> Html:
    """Build a table that scrolls sideways where it must. Columns that hold numbers are set right."""
    rows = [list(row) for row in rows]
    right = [
        place > 0 and any(place < len(row) and _is_number(row[place]) for row in rows)
        for place in range(len(header))
    ]
    kind = lambda place: "num" if right[place] else None
    head = tag(
        "tr",
        *(tag("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(header)),
    )
    body = [
        tag(
            "tr",
            *(
                tag("td", cell, class_=kind(i)) if i else tag("th", cell, scope="row")
                for i, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    inner = tag("table", tag("thead", head), tag("tbody", *body))
    # Focusable, so that the keyboard can scroll it.
    name = caption or ", ".join(str(cell) for cell in header if cell)
    box = tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=name)
    return box if caption is None else join([note(caption), box])


def _is_number(value: object) -> bool:
    return str(value).lstrip("+-−")[:1].isdigit()


def details(summary: str, body: Html) -> Html:
    """Fold something away behind a line to click on."""
    return tag("details", tag("summary", summary), body)


def figure(drawing: Html, caption: object) -> Html:
    """Put a caption above a drawing."""
    return tag("figure", tag("figcaption", caption), drawing)


def grid(*figures: Html) -> Html:
    """Set figures side by side where there is room."""
    return tag("div", *figures, class_="grid")

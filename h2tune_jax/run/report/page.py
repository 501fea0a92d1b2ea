"""The page: sections under one style sheet, complete in one file."""

from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from h2tune_jax.run.report.html import Html, safe, tag


class Section(NamedTuple):
    """A part of the report."""

    anchor: str
    title: str
    body: Html


def page(title: str, subtitle: object, sections: Sequence[Section]) -> str:
    """Put the report together. It asks the network for nothing, and no script runs in it."""
    style = files("h2tune_jax.run.report").joinpath("report.css").read_text(encoding="utf-8")
    links = [tag("a", part.title, href=f"#{part.anchor}") for part in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        # No request for a favicon either.
        Html('<link rel="icon" href="data:,">'),
        tag("title", title),
        # Our own file: escaping would break its selectors.
        Html(f"<style>{style}</style>"),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", title),
            tag("p", subtitle, class_="subtitle"),
            tag("nav", *links, aria_label="Sections"),
        ),
        tag("main", *(_section(part) for part in sections)),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _section(part: Section) -> Html:
    return tag("section", tag("h2", part.title), safe(part.body), id=part.anchor)

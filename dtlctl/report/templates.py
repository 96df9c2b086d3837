"""The templates of this folder, and how a number with its interval reads in them."""

from pathlib import Path
from typing import Any

import jinja2

from dtlctl.errors import counted
from dtlctl.report.intervals import Figure


def points(one: Figure | None) -> str:
    return "not measured" if one is None else span(one, "+.1f", " points")


def shared(attack: dict[str, Any]) -> str:
    """How much an attack recovers, with its interval."""
    if part := attack.get("recovered"):
        return f"{span(part, '.0%')} recovered"
    return "an unknown share recovered" if attack else "never attacked"


def span(one: Figure, form: str, unit: str = "") -> str:
    return f"{one['value']:{form}}{unit} {interval(one, form)}"


def interval(one: Figure, form: str) -> str:
    return "(no interval)" if one["low"] is None else f"[{one['low']:{form}}, {one['high']:{form}}]"


def render(template: str, **values: Any) -> str:
    return ENVIRONMENT.get_template(template).render(**values)


def said(macro: str, *values: Any) -> str:
    """A macro of `words.j2`, as one line of text: to a page, too, for one that it imports counts as markup there."""
    return " ".join(str(getattr(ENVIRONMENT.get_template("words.j2").module, macro)(*values)).split())


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=lambda name: ".html" in (name or ""),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""What a `.html` template shows is text and never markup, but for the figures; elsewhere nothing is escaped."""
ENVIRONMENT.globals |= {one.__name__: one for one in (points, shared, span, interval, said, counted)}

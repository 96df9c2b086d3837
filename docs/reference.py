"""Write the tables of docs/recipe.md from the schema: `python docs/reference.py`. What stands above them is by hand."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dtlctl.recipe.schema import Recipe
from dtlctl.recipe.settings import Training

PAGE = Path(__file__).with_name("recipe.md")
MARK = "<!-- The rest is written by docs/reference.py from the schema: change the text below a key in the code. -->\n"
SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
WORDS = {"string": "text", "boolean": "true or false", "number": "float", "object": "table"}
Model = type[BaseModel]


def page(text: str) -> str:
    """The page: of `text` what is above the mark, then every table of the recipe."""
    return text.partition(MARK)[0] + MARK + "\n" + "\n\n".join(sections()) + "\n"


def sections() -> Iterator[str]:
    """Every table of the recipe under a heading, each once, before the tables within it."""
    places: dict[Model | tuple[Model, ...], list[str]] = {}
    find(Recipe, "", places)
    training = False
    for models, paths in places.items():
        if isinstance(models, tuple):
            yield f"### {paths[0].rpartition('.')[2]}\n\n{kinds(models, paths[0])}"
            continue
        if issubclass(models, Training) and not training:
            training = True
            yield f"## Training\n\n{paragraphs(Training)}\n\n{table(Training)}"
        where = ", ".join(f"`[{path}]`" for path in paths if path)
        base = " Besides the keys of [training](#training):" if issubclass(models, Training) else ""
        heading = f"## {models.__name__ if where else 'Top level'}\n\n" + (where and where + ": ")
        yield f"{heading}{paragraphs(models)}{base}\n\n{table(models, Training if base else None)}"


def find(model: Model, path: str, places: dict[Model | tuple[Model, ...], list[str]]) -> None:
    """Add where each model, and each choice between kinds, stands within `model`, which stands at `path`."""
    places.setdefault(model, []).append(path)
    for name, field in model.model_fields.items():
        key, inner = f"{path}.{field.alias or name}".strip("."), tuple(models_in(field.annotation))
        if len(inner) > 1:
            places.setdefault(inner, []).append(key)
        elif inner:
            find(inner[0], f"{key}.NAME" if "dict" in str(field.annotation) else key, places)


def models_in(annotation: Any) -> Iterator[Model]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def kinds(models: tuple[Model, ...], path: str) -> str:
    """The kinds of a choice, then the keys of all, each key with the kinds that have it."""
    lines = ["| kind | meaning |", "|---|---|"]
    rows: dict[str, list[str]] = {}
    for model in models:
        kind = f'`"{model.model_fields["kind"].default}"`'
        lines.append(f"| {kind} | {text(model.__doc__)} |")
        for key, row in keys(model).items():
            if key != "kind":
                rows.setdefault(row, []).append(kind)
    owners = {row: ", ".join(of) if len(of) < len(models) else "all" for row, of in rows.items()}
    every = [row.replace(" |", f" | {of} |", 1) for row, of in owners.items()]
    head = ["| key | of | value | default | meaning |", "|---|---|---|---|---|"]
    return f"`{path}`: one of these kinds.\n\n" + "\n".join([*lines, "", *head, *every])


def table(model: Model, base: Model | None = None) -> str:
    """The keys of a table that are not, just so, its base's."""
    known = keys(base).values() if base else ()
    rows = [row for row in keys(model).values() if row not in known]
    return "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])


def keys(model: Model) -> dict[str, str]:
    """The row of every key of a table."""
    schema = model.model_json_schema(by_alias=True)
    nodes = schema.get("properties") or schema["$defs"][model.__name__]["properties"]
    rows = {}
    for name, field in model.model_fields.items():
        key = field.alias or name
        rows[key] = f"| `{key}` | {value(nodes[key])} | {default(field)} | {text(field.description)} |"
    return rows


def value(node: dict[str, Any]) -> str:
    """The type of a key and its limits, or all valid values."""
    choices = node.get("anyOf", [])
    if choices:
        return " or ".join(value(choice) for choice in choices if choice.get("type") != "null")
    if values := node.get("enum"):
        return ", ".join(f"`{json.dumps(v)}`" for v in values)
    if node.get("type") == "array":
        return f"list: {value(node['items'])}"
    if "additionalProperties" in node:
        return "tables"
    limits = [f"{sign} {node[word]:.12g}" for word, sign in SIGNS.items() if word in node]
    return ", ".join([WORDS.get(word := node.get("type", "object"), word), *limits])


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or isinstance(field.default, BaseModel):
        found = field.default and field.default.model_dump(mode="json", by_alias=True, exclude_unset=True)
        kind = {"kind": field.default.kind} if hasattr(field.default, "kind") else {}
        inside = ", ".join(f"{k} = {json.dumps(v)}" for k, v in {**kind, **(found or {})}.items())
        return f"`{{ {inside} }}`" if inside else "`{}`" if field.default else "none"
    return f"`{json.dumps(field.default)}`"


def paragraphs(model: Model) -> str:
    """The docstring of a table, each paragraph on one line."""
    return "\n\n".join(map(text, inspect.cleandoc(model.__doc__ or "").split("\n\n")))


def text(words: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join(inspect.cleandoc(words or "").partition("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

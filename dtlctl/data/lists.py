"""Lists that name the images of a split and their classes: CSV, TSV, JSON lines."""

import csv
import io
import json
import os
import posixpath
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dtlctl.data.classes import show, some
from dtlctl.data.dataset import Asked, label_text
from dtlctl.errors import DataError

LISTS = (".csv", ".tsv", ".jsonl")
_COLUMNS = {"image": ("file_name", "filename", "file", "path", "image"), "label": ("label", "class")}  # of a list


class Place(NamedTuple):
    """Where a split lies: a folder relative to the root, and a list of its images, or "" if there is none."""

    folder: str
    list: str


def read_list(asked: Asked, root: Path, files: Collection[str], place: Place) -> dict[str, str | None]:
    """The images of a list, and their classes; None for a row without one. Raises DataError."""
    path = asked.dataset.path
    name = os.path.join(path, place.list)
    start, end = posixpath.splitext(place.list)
    if twins := [start + other for other in LISTS if other != end and start + other in files]:
        raise DataError(f"{name}: {twins[0]} is a list of the same split; move one of the two out of the way")
    try:
        text = (root / place.list).read_bytes().decode("utf-8-sig")
        if place.list.lower().endswith(".jsonl"):
            rows = [dict(json.loads(line)) for line in text.split("\n") if line.strip()]
            columns = [*rows[0]] if rows else []
        else:
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            rows, columns = list(reader), [*(reader.fieldnames or ())]
    except UnicodeDecodeError:
        raise DataError(f"{name}: it is not UTF-8; save it as UTF-8") from None
    except (OSError, ValueError, TypeError, RecursionError, csv.Error) as error:
        raise DataError(f"{name}: cannot be read: {error}") from error
    if not rows:
        raise DataError(f"{name}: has no rows")
    image, label = (_column(asked, name, key, columns) for key in ("image", "label"))
    others = [column for column in columns if column not in (image, label)]
    refuse_splits(asked, name, "list", {column: [row.get(column) for row in rows] for column in others})
    files, found = set(files), {}
    missing: list[str] = []
    kinds_of: dict[str, type] = {}
    for row in rows:
        written, value = str(row.get(image) or ""), row.get(label)
        inside = written.replace("\\", "/").removeprefix(f"{root}/")
        starts = (posixpath.dirname(place.list), place.folder)
        file = next((p for s in starts if (p := posixpath.normpath(posixpath.join(s, inside))) in files), None)
        if file is None:
            missing.append(written)
            continue
        if file in found:
            raise DataError(f"{name}: {written!r} is named twice")
        if None in row:
            raise DataError(f"{name}: the row of {written!r} has more fields than the header")
        found[file] = known = label_text(value, f"{name}: {written!r}")
        if known and kinds_of.setdefault(known, type(value)) is not type(value):
            raise DataError(f"{name}: the label {value} is there as a number and as text; write it in one way")
    _refuse_missing(name, missing, files, path)
    return found


def refuse_splits(asked: Asked, name: str, kind: str, columns: Mapping[str, Iterable[Any]]) -> None:
    """A list or table is one split: where a column names several, what is to be tested on would be trained on."""
    usual, ending = asked.usual, posixpath.splitext(name)[1]
    for column, values in columns.items():
        texts = {value for value in values if isinstance(value, str)}
        if len(found := sorted(text for text in texts if text.strip().casefold() in usual or text in usual)) > 1:
            raise DataError(
                f"{name}: a {kind} is one split, and its column {column!r} has rows of {some(found)}; "
                f"write a {kind} of each, as train{ending} and test{ending}, or remove the column"
            )


def _refuse_missing(name: str, missing: list[str], files: Collection[str], path: str) -> None:
    """All of them at once, so that nobody has to begin again for each; and why a file that is there is none."""
    if not missing:
        return
    text = f"{name}: {missing[0]!r} is no file in {path}; add it, or remove its row"
    text += f"; {len(missing) - 1:,} more: {some(missing[1:], 20, repr)}" if missing[1:] else ""
    base = posixpath.basename
    for near, remedy in (
        (base, "write its folder too"),
        (lambda file: unicodedata.normalize("NFC", base(file)).casefold(), "write it as it is spelt there"),
        (lambda file: posixpath.splitext(base(file))[0], "write its suffix too"),
    ):
        there = {near(file): file for file in files}
        if found := next((there[near(file)] for file in missing if near(file) in there), None):
            text += f"; {show(found)} is there: {remedy}"
            break
    raise DataError(text)


def _column(asked: Asked, name: str, key: str, known: Iterable[Any]) -> str:
    """The recipe's, or the only one with a usual name."""
    wanted = getattr(asked.dataset, key)
    names = (wanted,) if wanted else _COLUMNS[key]
    found = [column for column in known if (column if wanted else str(column).casefold()) in names]
    if len(found) == 1:
        return found[0]
    if blank := [column for column in known if str(column) != (bare := str(column).strip()) and bare in names]:
        raise DataError(f"{name}: the column {blank[0]!r} has blanks around its name; remove them")
    said = f"no single column named {' or '.join(names)}"
    if wanted:
        said = f"{len(found) or 'no'} column{'s' * bool(found)} {wanted!r}"
    raise DataError(f"{name} has {said}; set data.{asked.role}.{key} (columns: {', '.join(map(str, known))})")

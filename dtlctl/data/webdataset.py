"""Webdataset shards: tar files whose members belong together by name, such as 000.jpg with 000.cls or 000.json.

Images are read where they lie, at places that one look at all headers finds. The builder of `datasets` would copy every
image before a label is known, takes no names as labels, and its columns from the first five samples.
"""

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

from dtlctl.data.classes import numbered, some
from dtlctl.data.dataset import Asked, Note, Rows, Split, label_text
from dtlctl.data.files import Tree, hidden, kinds, read_file, suffixes
from dtlctl.errors import DataError, one_line

Member = tuple[str, int, int]
"""Its name, where its content begins in the shard, and how many bytes it has."""
Samples = dict[str, dict[str, Member]]
"""Of a shard: the members of each sample, by their kinds."""


def from_folder(asked: Asked, tree: Tree) -> Callable[[Split], Rows] | None:
    """Opens splits; None of a folder with images beside the shards, or whose first tar is something else.

    A shard belongs to the split that its path names first, as words in any case: `train-000.tar`, `a/Val/0.tar`. All
    raise DataError.
    """
    shards = [file for file in tree.files if file.lower().endswith(".tar") and not hidden(file)]
    if not shards or any(posixpath.splitext(file)[1].lower() in suffixes() for file in tree.files):
        return None
    try:
        first = next((file for file in shards if tarfile.is_tarfile(tree.root / file)), None)
    except OSError as error:
        raise DataError(f"data.{asked.role}.path: {error.filename}: {error.strerror}") from error
    if first is None:
        return None
    samples = _samples(tree.root / first)
    if not any(_images(asked, one) and {asked.dataset.label or "cls", "json"} & {*one} for one in samples.values()):
        return None
    names = "|".join(map(re.escape, asked.usual))
    named = re.compile(rf"(?<![^\W_])({names})(?![^\W_])", re.IGNORECASE)
    splits: dict[str, list[str]] = {}
    for file in shards:
        found = named.search(file)
        splits.setdefault(found[1] if found else "", []).append(file)
    if {*splits} == {""}:
        splits = {"train": shards}
    looked = {first: samples}  # not read again when its split is opened
    return lambda split: _opened(asked, tree, split, splits, looked)


def _opened(asked: Asked, tree: Tree, split: Split, splits: dict[str, list[str]], looked: dict[str, Samples]) -> Rows:
    asked.check(split, filter(None, splits))
    labels, members, bare = list[str | None](), list[tuple[str, Member]](), list[str]()
    for shard in splits[asked.name(split)]:
        for key, parts in (looked.pop(shard, None) or _samples(tree.root / shard)).items():
            images = _images(asked, parts)
            if len(images) > 1:
                several = f"sample {key} has several images: {', '.join(images)}"
                raise DataError(f"{tree.root / shard}: {several}; set data.{asked.role}.image to one of them")
            if images:
                members.append((shard, parts[images[0]]))
                labels.append(_label(asked, tree.root / shard, parts))
            else:
                bare.append(key)
    if not any(label is not None for label in labels):
        wanted = f"{asked.dataset.label!r}" if asked.dataset.label else "`.cls`, and no JSON with `label`"
        raise DataError(f"data.{asked.role}.label: {asked.where(split)}: no image has a {wanted}; name the label's")
    numbers = all(label is None or re.fullmatch(r"0|[1-9]\d{0,999}", label) for label in labels)
    values = [None if label is None else int(label) if numbers else label for label in labels]
    unread = [file for file in tree.files if hidden(file) or not file.lower().endswith(".tar")]
    said = (
        ("no-image", bare, f"{len(bare)} samples have no image: {some(bare)}"),
        ("unread", unread, f"not read beside the shards{kinds(unread)}"),
    )

    return Rows(
        *numbered(values),
        lambda rows: [_read(tree.root / shard, member) for shard, member in (members[row] for row in rows)],
        lambda row: os.path.join(asked.dataset.path, members[row][0], members[row][1][0]),
        tuple(Note(kind, len(what), f"{asked.where(split)}: {text}") for kind, what, text in said if what),
        tuple(name or splits[""][0] for name in splits),
    )


def _samples(shard: Path) -> Samples:
    """By the name up to its first dot, by what follows in lower case; what is no file of a sample has no parts."""
    found: Samples = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, name = posixpath.split(member.name)
                key, _, kind = name.partition(".")
                if member.isdir():
                    continue
                if not (member.isreg() and key and kind):  # hidden, a link, ..., of no kind
                    found[member.name] = {}
                    continue
                parts = found.setdefault(posixpath.join(folder, key), {})
                if kind.lower() in parts:
                    raise DataError(f"{shard}: {member.name!r} is there twice")
                parts[kind.lower()] = member.name, member.offset_data, member.size
        with open(shard, "rb") as file:  # tarfile takes a broken header for the end
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut short or broken")
    except (OSError, tarfile.TarError) as error:
        remedy = "; pack it again, whole and not compressed, or take it out" * isinstance(error, tarfile.TarError)
        raise DataError(f"{shard}: the shard cannot be read: {one_line(error)}{remedy}") from error
    return found


def _images(asked: Asked, parts: dict[str, Member]) -> list[str]:
    wanted = asked.dataset.image
    return [kind for kind in parts if (kind == wanted if wanted else posixpath.splitext(f"a.{kind}")[1] in suffixes())]


def _label(asked: Asked, shard: Path, parts: dict[str, Member]) -> str | None:
    """The text of the member that the recipe names, or `.cls`; else what the JSON has under this name, or `label`."""
    wanted = asked.dataset.label
    own = parts.get(wanted or "cls")
    if (member := own or parts.get("json")) is None:
        return None
    try:
        text = _read(shard, member).decode("utf-8-sig").strip()
        value = text if own else json.loads(text).get(wanted or "label")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{shard}: {member[0]!r} cannot be read: {one_line(error)}") from error
    return label_text(value, f"{shard}: {member[0]!r}")


def _read(shard: Path, member: Member) -> bytes:
    name, start, size = member
    return read_file(shard, f"{shard}: {name}", start, size)

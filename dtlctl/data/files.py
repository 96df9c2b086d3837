"""Images in a local folder: what one walk finds, in class folders or named by a list, and what of it is not read."""

from __future__ import annotations

import os
import posixpath
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dtlctl.data.classes import some
from dtlctl.data.dataset import USUAL, Dataset, Note, Rows, Split, check_split, where
from dtlctl.data.lists import LISTS, Place, read_list
from dtlctl.errors import DataError, NoSplit

_SYSTEM = {".ds_store", "thumbs.db", "desktop.ini"}  # an operating system's own, never a user's
_HINTS = dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"), _UNPACK := "unpack it")
_HINTS |= dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif") | {".avif": "pip install -U pillow"}


class Tree(NamedTuple):
    """All that lies below a folder. Paths are relative to it, in order, with "/" between their parts."""

    root: Path
    files: list[str]
    folders: list[str]


def walk(root: Path, role: str) -> Tree:
    """Raises DataError for a folder that cannot be listed."""

    def fail(error: OSError):
        raise DataError(f"data.{role}.path: {error.filename}: {error.strerror}") from error

    tree = Tree(root, [], [])
    # Links are followed because `train` is often one.
    for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
        below.sort()
        for link in (os.path.join(folder, name) for name in below if os.path.islink(os.path.join(folder, name))):
            if (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(link) + os.sep):
                raise DataError(f"data.{role}.path: {link} links to a folder that it lies in")
        start = os.path.relpath(folder, root).replace(os.sep, "/") + "/" if folder != str(root) else ""
        tree.folders.extend(start + name for name in below)
        tree.files.extend(start + name for name in sorted(names) if name.lower() not in _SYSTEM)
    return tree


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of what an image may be. It reads more, some of it through other programs (EPS: Ghostscript)."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    wanted = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    return tuple(name for name in wanted if name in Image.OPEN)


@cache
def suffixes() -> frozenset[str]:
    """Those that files of these formats have."""
    known = formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def reason(blob: bytes) -> str:
    """Why the content of a file is no image that can be read."""
    if not blob:
        return "it is empty"
    if blob[4:8] == b"ftyp":
        return "it is HEIF or AVIF; pip install pillow-heif, or -U pillow for AVIF"
    return f"it is no image of a known format (it begins with {blob[:12]!r})"


def opened(dataset: Dataset, split: Split, role: str, tree: Tree) -> Rows:
    """A split of a folder of images, its labels numbered by its own classes. Raises DataError.

    The split NAME is NAME/CLASS/image; or the images that a list names: NAME.csv (.tsv, .jsonl), or the only list in
    NAME/. A folder without splits is the split "train".
    """
    name, place, splits = getattr(dataset, split), where(dataset, split), _splits(dataset, tree)
    if not splits:
        raise DataError(f"data.{role}.path: {dataset.path} holds no image and no table{kinds(tree.files)}")
    if "" in splits and name != "train":
        raise NoSplit(
            f"data.{role}.{split}: {dataset.path} is not divided into splits, so there is no {name!r}; "
            + ("write test = 0.2 to hold out a part of each class, or " if split == "test" else "")
            + f"move images of each class to {name}/CLASS/ and the rest to {dataset.train}/CLASS/"
        )
    if "" not in splits:
        _check_layout(dataset, split, role, tree, splits)
        check_split(dataset, split, role, splits)
    here = splits.get("") or splits[name]
    images, guessed, unread = _sort(tree, here.folder)
    inner = [_inside(file, here.folder).split("/") for file in images]
    labels: list[str | None]
    if here.list and (any(len(parts) == 1 for parts in inner) or len({parts[0] for parts in inner}) < 2):
        named = read_list(dataset, role, tree.root, tree.files, here)
        lists = [splits[other] for other in (dataset.train, dataset.test) if other in splits]
        known = {here.list, *named}
        for other in (one for one in lists if one.list):
            known |= {other.list, *read_list(dataset, role, tree.root, tree.files, other)}
        unread = [file for file in (*unread, *images) if file not in known]
        images, labels, guessed = list(named), list(named.values()), []
        classes = sorted({label for label in labels if label is not None})
    else:
        labels = [parts[0] for parts in inner]
        classes = [f for f in (_inside(f, here.folder) for f in tree.folders) if f and "/" not in f and f[0] != "."]
        for key in ("image", "label"):
            if (column := getattr(dataset, key)) not in (None, key):
                raise DataError(f"data.{role}.{key}: {dataset.path} has class folders, and no column {column!r}")
        _check_folders(place, images, 2 if here.folder else 1, unread)
        if here.list:
            _check_same(dataset, role, tree, here, dict(zip(images, labels, strict=True)))
            unread = sorted({*unread, here.list})
    classes, notes = _filled(classes, labels, place)
    number: dict[str | None, int] = {None: -1, **{label: index for index, label in enumerate(classes)}}
    if guessed:
        notes.append(Note("by-content", len(guessed), f"{place}: read as images by content alone{kinds(guessed)}"))
    if unread:
        notes.append(Note("unread", len(unread), f"{place}: not read{kinds(unread)}"))

    def read(row: int) -> bytes:
        try:
            return (tree.root / images[row]).read_bytes()
        except OSError as error:
            raise DataError(f"{path(row)}: {error.strerror}") from error

    def path(row: int) -> str:
        return os.path.join(dataset.path, images[row])

    numbers = np.array([number[label] for label in labels], np.int64)
    there = _held(tree, splits, bool(here.list))
    return Rows(numbers, tuple(classes), lambda rows: [read(row) for row in rows], path, tuple(notes), there)


def _splits(dataset: Dataset, tree: Tree) -> dict[str, Place]:
    """By name. A folder in which nothing is named as a split usually is, is one split: ""."""
    folders = [folder for folder in tree.folders if "/" not in folder and not _hidden(folder)]
    lists = {posixpath.splitext(file)[0]: file for file in _lists(tree, "")}
    usual = {dataset.train, dataset.test, *USUAL["train"], *USUAL["test"]}
    if not any(name.casefold() in usual or name in usual for name in (*folders, *lists)):
        images = _sort(tree, "")[0]
        only = next(iter(lists.values())) if len(lists) == 1 else ""
        if only or any(image.count("/") < 2 for image in images):
            return {"": Place("", only)}
    splits = {name: Place("", file) for name, file in lists.items()}
    for name in folders:
        inner = _lists(tree, name)
        splits[name] = Place(name, lists.get(name) or (inner[0] if len(inner) == 1 else ""))
    return splits


def _held(tree: Tree, splits: dict[str, Place], listed: bool) -> tuple[str, ...]:
    """The names of splits that are there. listed: by lists, beside which a folder is where their images are."""
    known = tuple(suffixes())
    holding = {file.split("/", 1)[0] for file in tree.files if file.lower().endswith(known)}
    if listed:
        holding = {folder for folder in holding if folder.casefold() in sum(USUAL.values(), ())}
    return tuple(name for name, place in splits.items() if place.list or name in holding)


def _check_layout(dataset: Dataset, split: Split, role: str, tree: Tree, splits: dict[str, Place]) -> None:
    """Raise DataError where a split is missing because it is packed, or because splits lie inside the classes."""
    name, usual = getattr(dataset, split), {dataset.train, dataset.test, *USUAL["train"], *USUAL["test"]}
    if name in splits:
        return
    packed = [file for file in tree.files if file.startswith(f"{name}.") and _HINTS.get(_suffix(file)) == _UNPACK]
    if packed:
        raise DataError(f"data.{role}.{split}: {os.path.join(dataset.path, packed[0])} is an archive; unpack it")
    inner = [folder for folder in tree.folders if folder.count("/") == 1 and not _hidden(folder)]
    if inner and all(folder.split("/")[1] in usual for folder in inner):
        raise DataError(
            f"data.{role}.path: {dataset.path} holds CLASS/SPLIT/image, as in {inner[0]}; move the splits to the top: "
            "SPLIT/CLASS/image"
        )


def _check_folders(place: str, images: list[str], depth: int, unread: list[str]) -> None:
    """Raise DataError unless there are images, and every one lies in a class folder."""
    if not images:
        raise DataError(f"{place}: no image can be read{kinds(unread)}")
    if wrong := next((file for file in images if file.count("/") != depth), None):
        raise DataError(
            f"{place}: {wrong} has no class: every image must lie at SPLIT/CLASS/image, neither above nor below, or be "
            "named in SPLIT.csv with the columns file_name and label"
        )


def _filled(classes: list[str], labels: list[str | None], place: str) -> tuple[list[str], list[Note]]:
    """The classes that have an image, and what is to be said of the others.

    Images of such a class in the other split alone are refused, as of any class that training lacks.
    """
    used = {*labels}
    empty = [name for name in classes if name not in used]
    said = f"{place}: class folders without an image that can be read: {some(empty)}"
    return [name for name in classes if name in used], [Note("empty-folders", len(empty), said)] if empty else []


def _check_same(dataset: Dataset, role: str, tree: Tree, place: Place, folders: dict[str, str | None]) -> None:
    """Raise DataError for a list whose classes are others than the folders, however named; it may be no such list."""
    try:
        named = read_list(dataset, role, tree.root, tree.files, place)
    except DataError:
        return
    pairs = {(folders[file], label) for file, label in named.items() if label is not None and file in folders}
    if not len(pairs) == len({folder for folder, _ in pairs}) == len({label for _, label in pairs}):
        raise DataError(
            f"{os.path.join(dataset.path, place.list)}: its labels divide the images otherwise than the class folders "
            "beside it; move the one that is not meant out of the way"
        )


def _lists(tree: Tree, folder: str) -> list[str]:
    lists = [file for file in tree.files if file.lower().endswith(LISTS)]
    return [file for file in lists if posixpath.dirname(file) == folder and not _hidden(file)]


def _sort(tree: Tree, folder: str) -> tuple[list[str], list[str], list[str]]:
    """The images of a folder; those of them that only their content shows to be images; what is not read."""
    images, guessed, unread = [], [], []
    for file in tree.files:
        if not file.startswith(f"{folder}/" if folder else ""):
            continue
        if not _hidden(file) and (_suffix(file) in suffixes() or _opens(tree.root / file)):
            images.append(file)
            if _suffix(file) not in suffixes():
                guessed.append(file)
        else:
            unread.append(file)
    return images, guessed, unread


def _opens(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.open(path, formats=formats()).close()
    except Image.DecompressionBombError:
        return True  # for the decoder to refuse by name
    except Exception:  # PIL's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        return False
    return True


def kinds(files: Sequence[str], most: int = 5) -> str:
    """ ": 12 .heic (a/1.heic; pip install pillow-heif), 3 .txt (a/x.txt)" for a message; of no files, nothing."""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault("hidden" if _hidden(file) else _suffix(file) or "without suffix", []).append(file)
    some = sorted(groups.items(), key=lambda kind: -len(kind[1]))
    said = [f"{len(f)} {k} ({f[0]}{'; ' + _HINTS[k] if k in _HINTS else ''})" for k, f in some[:most]]
    more = [f"{len(some) - most} other kinds"] if len(some) > most else []
    return (": " if said else "") + ", ".join(said + more)


def _suffix(file: str) -> str:
    return posixpath.splitext(file)[1].lower()


def _hidden(file: str) -> bool:
    return any(part.startswith(".") for part in file.split("/"))


def _inside(file: str, folder: str) -> str:
    """A path relative to a folder; "" if it lies elsewhere."""
    start = f"{folder}/" if folder else ""
    return file[len(start) :] if file.startswith(start) else ""

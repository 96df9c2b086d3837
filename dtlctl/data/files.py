"""Images in a local folder: what one walk finds, in class folders or named by a list, and what of it is not read."""

import os
import posixpath
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from stat import S_ISREG

from PIL import Image

from dtlctl.data.classes import numbered, some
from dtlctl.data.dataset import Asked, Note, Rows, Split
from dtlctl.data.lists import LISTS, Place, read_list
from dtlctl.errors import DataError, NoSplit, one_line

_SYSTEM = {".ds_store", "thumbs.db", "desktop.ini"}  # an operating system's own, never a user's
_HINTS = dict.fromkeys((".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"), _UNPACK := "unpack it")
_HINTS |= dict.fromkeys((".heic", ".heif", ".hif"), "pip install pillow-heif") | {".avif": "pip install -U pillow"}


class Tree:
    """All below a folder, looked at once: paths relative to it, in order, with "/" between their parts.

    Links are followed, because `train` is often one. Raises DataError.
    """

    def __init__(self, root: Path, role: str):
        self.root, self.folders, failed = root, list[str](), list[OSError]()
        self.stats: list[tuple[str, int, int]] = []  # of every file: its path, size and time
        try:
            for here, below, names in os.walk(root, onerror=failed.append, followlinks=True):
                start = "" if here == str(root) else f"{Path(here).relative_to(root).as_posix()}/"
                below.sort()  # they are walked in this order
                for link in filter(os.path.islink, (os.path.join(here, name) for name in below)):
                    if (os.path.realpath(here) + os.sep).startswith(os.path.realpath(link) + os.sep):
                        raise DataError(f"data.{role}.path: {link} links to a folder that it lies in")
                self.folders.extend(start + name for name in below)
                for name in sorted(names):
                    if name.lower() not in _SYSTEM:
                        stat = os.stat(os.path.join(here, name))
                        if not S_ISREG(stat.st_mode):  # to open a pipe waits for ever
                            said = "is a pipe, a socket or a device; move it away"
                            raise DataError(f"data.{role}.path: {os.path.join(here, name)} {said}")
                        self.stats.append((start + name, stat.st_size, stat.st_mtime_ns))
            if failed:
                raise failed[0]
        except OSError as error:
            why = "links to nothing; remove it" if os.path.islink(error.filename) else error.strerror
            raise DataError(f"data.{role}.path: {error.filename}: {why}") from error
        self.files = [name for name, _, _ in self.stats]
        self.lists = [name for name in self.files if name.lower().endswith(LISTS) and not hidden(name)]


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


_STARTS = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*": "TIFF", b"RIFF": "WebP"}
"""How files of these formats begin."""


def reason(blob: bytes) -> str:
    """Why the content of a file is no image that can be read, and what to do."""
    if not blob:
        return "it is empty; replace or remove it"
    if blob[4:8] == b"ftyp":
        return "it is HEIF or AVIF; pip install pillow-heif, or -U pillow for AVIF"
    if name := next((name for start, name in _STARTS.items() if blob.startswith(start)), None):
        return f"it is a {name} that is cut short or broken; replace or remove it"
    return f"it is no image of a known format (it begins with {blob[:12]!r}); replace or remove it"


def opened(asked: Asked, tree: Tree, split: Split) -> Rows:
    """A split of a folder of images, its labels numbered by its own classes. Raises DataError.

    The split NAME is NAME/CLASS/image; or what a list names: NAME.csv (.tsv, .jsonl), or the only list in NAME/. A
    folder without splits is the split "train".
    """
    splits, place = _splits(asked, tree), asked.where(split)
    _check_layout(asked, split, tree, splits)
    here = splits.get("") or splits[asked.name(split)]
    start, depth = (f"{here.folder}/", 1) if here.folder else ("", 0)
    images, guessed, unread = _sort(tree, start)
    labels: list[str | None] = [file.split("/", depth + 1)[depth] for file in images]
    # Where lists at the top are the splits, class folders beside them hold the images of all.
    beside = not here.folder and "" not in splits
    if here.list and (beside or len({*labels}) < 2 or any(file.count("/") == depth for file in images)):
        known, named = _named(asked, tree, splits, here)
        unread = [file for file in (*unread, *images) if file not in known]
        images, labels, guessed, folders = list(named), list(named.values()), [], list[str]()
    else:
        folders = [f[len(start) :] for f in tree.folders if f.startswith(start) and f.count("/") == depth]
        _check_folders(asked, split, images, depth + 1, unread)
        if here.list:
            _check_same(asked, tree, here, dict(zip(images, labels, strict=True)))
            unread = sorted({*unread, here.list})
    # Images of a class without any here in the other split alone are refused, as of any class that training lacks.
    numbers, classes = numbered(labels)
    empty = sorted(name for name in {*folders} - {*classes} if not name.startswith("."))
    said = (
        ("empty-folders", empty, f"class folders without an image that can be read: {some(empty)}"),
        ("by-content", guessed, f"read as images by content alone{kinds(guessed)}"),
        ("unread", unread, f"not read{kinds(unread)}"),
    )

    def path(row: int) -> str:
        return os.path.join(asked.dataset.path, images[row])

    tops = {file.partition("/")[0]: "/" in file for file in tree.files if _suffix(file) in suffixes()}
    loose = [top for top, inside in tops.items() if here.folder and not here.list and not inside]
    # Beside lists, a folder is where their images are.
    holding = {top for top in tops if not here.list or top.casefold() in asked.usual}
    return Rows(
        numbers,
        classes,
        lambda rows: [read_file(tree.root / images[row], path(row)) for row in rows],
        path,
        tuple(Note(kind, len(what), f"{place}: {text}") for kind, what, text in said if what),
        (*(name for name, one in splits.items() if one.list or name in holding), *loose),
    )


def _splits(asked: Asked, tree: Tree) -> dict[str, Place]:
    """By name. A folder in which nothing is named as a split usually is, is one split: ""."""
    folders = [folder for folder in tree.folders if "/" not in folder and not hidden(folder)]
    lists: dict[str, list[str]] = {}
    for file in tree.lists:
        lists.setdefault(posixpath.dirname(file), []).append(file)
    named = {posixpath.splitext(file)[0]: file for file in lists.get("", ())}
    usual = asked.usual
    if not any(name.casefold() in usual or name in usual for name in (*folders, *named)):
        only = next(iter(named.values())) if len(named) == 1 else ""
        if only or any(image.count("/") < 2 for image in _sort(tree, "")[0]):
            return {"": Place("", only)}
    splits = {name: Place("", file) for name, file in named.items()}
    for name in folders:
        inner = lists.get(name, [])
        splits[name] = Place(name, named.get(name) or (inner[0] if len(inner) == 1 else ""))
    return splits


def _named(asked: Asked, tree: Tree, splits: dict[str, Place], here: Place) -> tuple[set[str], dict[str, str | None]]:
    """The lists of both splits and all that they name; the images of the one `here`, and their classes."""
    names = (asked.dataset.train, asked.name("test"))
    places = [here, *(splits[name] for name in names if name in splits and splits[name].list)]
    read = {place: read_list(asked, tree.root, tree.files, place) for place in dict.fromkeys(places)}
    return {name for place, rows in read.items() for name in (place.list, *rows)}, read[here]


def _check_layout(asked: Asked, split: Split, tree: Tree, splits: dict[str, Place]) -> None:
    """Raise DataError where a split is not there, with what is to be done about it."""
    name, path, role = asked.name(split), asked.dataset.path, f"data.{asked.role}"
    if not splits:
        raise DataError(f"{role}.path: {path} holds no image and no table{kinds(tree.files)}")
    if "" in splits and name != "train":
        raise NoSplit(
            f"{role}.{split}: {path} is not divided into splits, so there is no {name!r}; "
            + ("write test = 0.2 to hold out a part of each class, or " if split == "test" else "")
            + f"move images of each class to {name}/CLASS/ and the rest to {asked.dataset.train}/CLASS/"
        )
    if "" in splits or name in splits:
        return
    packed = [file for file in tree.files if file.startswith(f"{name}.") and _HINTS.get(_suffix(file)) == _UNPACK]
    if packed:
        raise DataError(f"{role}.{split}: {os.path.join(path, packed[0])} is an archive; unpack it")
    inner = [folder for folder in tree.folders if folder.count("/") == 1 and not hidden(folder)]
    if inner and all(folder.split("/")[1] in asked.usual for folder in inner):
        raise DataError(
            f"{role}.path: {path} holds CLASS/SPLIT/image, as in {inner[0]}; move the splits to the top: "
            "SPLIT/CLASS/image"
        )
    asked.check(split, splits)


def _check_folders(asked: Asked, split: Split, images: list[str], depth: int, unread: list[str]) -> None:
    """Raise DataError unless there are images, each right in a class folder, and no columns are asked for."""
    for key in ("image", "label"):
        if (column := getattr(asked.dataset, key)) not in (None, key):
            said = f"{asked.dataset.path} has class folders, and no column {column!r}"
            raise DataError(f"data.{asked.role}.{key}: {said}")
    if not images:
        raise DataError(f"{asked.where(split)}: no image can be read{kinds(unread)}")
    if wrong := next((file for file in images if file.count("/") != depth), None):
        raise DataError(
            f"{asked.where(split)}: {wrong} has no class: every image must lie at SPLIT/CLASS/image, neither above nor "
            "below, or be named in SPLIT.csv with the columns file_name and label"
        )


def _check_same(asked: Asked, tree: Tree, place: Place, folders: dict[str, str | None]) -> None:
    """Raise DataError for a list whose classes are others than the folders, however named; it may be no such list."""
    try:
        named = read_list(asked, tree.root, tree.files, place)
    except DataError:
        return
    pairs = {(folders[file], label) for file, label in named.items() if label is not None and file in folders}
    if not len(pairs) == len({folder for folder, _ in pairs}) == len({label for _, label in pairs}):
        raise DataError(
            f"{os.path.join(asked.dataset.path, place.list)}: its labels divide the images otherwise than the class "
            "folders beside it; move the one that is not meant out of the way"
        )


def _sort(tree: Tree, start: str) -> tuple[list[str], list[str], list[str]]:
    """Of the files of a folder: the images; those of them that only their content shows to be images; all others."""
    images, guessed, unread, known = list[str](), list[str](), list[str](), suffixes()
    for file in tree.files:
        if file.startswith(start):
            named = _suffix(file) in known
            if hidden(file) or not (named or _opens(tree.root / file)):
                unread.append(file)
                continue
            images.append(file)
            if not named:
                guessed.append(file)
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


def read_file(path: Path, name: str, start: int = 0, size: int = -1) -> bytes:
    """A file, or of one so many bytes from `start` on. Raises DataError that calls it `name`."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}") from error


def kinds(files: Sequence[str], most: int = 5) -> str:
    """ ": 12 .heic (a/1.heic; pip install pillow-heif), 3 .txt (a/x.txt)" for a message; of no files, nothing."""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault("hidden" if hidden(file) else _suffix(file) or "without suffix", []).append(file)
    some = sorted(groups.items(), key=lambda kind: -len(kind[1]))
    said = [one_line(f"{len(f)} {k} ({f[0]}{'; ' + _HINTS[k] if k in _HINTS else ''})") for k, f in some[:most]]
    more = [f"{len(some) - most} other kinds"] if len(some) > most else []
    return (": " if said else "") + ", ".join(said + more)


def _suffix(file: str) -> str:
    return posixpath.splitext(file)[1].lower()


def hidden(file: str) -> bool:
    """Whether a file, or a folder that it is in, is no user's: macOS writes ._NAME beside what it copies."""
    return file.startswith(".") or "/." in file

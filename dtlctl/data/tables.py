"""Opening tables with the `datasets` library: a hub id, a local folder, one local file.

The only file that knows how the library finds its files, what it raises, and where it is silently wrong.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dtlctl.console import stop
from dtlctl.data.classes import some
from dtlctl.data.dataset import Dataset, Note, Rows, Split, check_split, unlabelled, where
from dtlctl.data.files import Tree, kinds, suffixes
from dtlctl.data.lists import LISTS
from dtlctl.data.shards import check_shards, read_column, read_features
from dtlctl.errors import DataError, DtlError, nearest

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = tuple(_BUILDERS)
"""Of files that hold rows of images."""


class Source(NamedTuple):
    """What the library made of a dataset."""

    tables: Mapping[str, Any]  # a `datasets.Dataset` a split
    files: Mapping[str, list[str]] = {}  # the local files of a split, in the order of its rows
    notes: tuple[Note, ...] = ()
    others: tuple[str, ...] = ()  # files and folders of tables or images that belong to no split of the recipe


class Labels(NamedTuple):
    """What stands for a table of which no image is wanted: its features, and an arrow table of its labels alone."""

    features: Mapping[str, Any]
    data: Any


def from_hub(dataset: Dataset, role: str) -> Source:
    """Raises DataError, as all here do."""
    hint = "; check the id, config and revision, the network, and HF_HUB_OFFLINE and HF_HOME"
    return Source(_build(dataset, role, hint, path=dataset.path, name=dataset.config, revision=dataset.revision))


def from_file(dataset: Dataset, split: Split, role: str, root: Path, scratch: Path | None) -> Source:
    """A parquet or arrow file: the split "train" converted in `scratch`. Without it only labels are read; so below."""
    if root.suffix.lower() not in _BUILDERS:
        hint = "; write the folder that holds it" if root.suffix.lower() in LISTS else kinds([root.name])
        raise DataError(f"data.{role}.path: {root} is neither a folder nor a .parquet or .arrow file{hint}")
    return _by_split(dataset, split, role, {"train": [str(root)]}, scratch)


def from_folder(dataset: Dataset, split: Split, role: str, tree: Tree, scratch: Path | None) -> Source | None:
    """What `save_to_disk` wrote, or parquet and arrow files; None of a folder that has neither."""
    root, top = tree.root, [folder for folder in tree.folders if "/" not in folder]
    if saved := [name for name in ("", *top) if {"state.json", "dataset_info.json"} <= {*os.listdir(root / name)}]:
        return Source({name or "train": _load(dataset, role, partial(_saved, root / name)) for name in saved})
    splits = [name for name in (dataset.train, dataset.test) if name in top]
    starts = tuple(f"{name}/" for name in splits) or ("",)
    inside = [file for file in tree.files if file.startswith(starts)]
    if not any(file.lower().endswith(SUFFIXES) for file in inside):
        return None
    if glob := set(str(root)) & set("*?[]"):
        raise DataError(f"data.{role}.path: {root} holds {min(glob)!r}, which reads as a pattern; rename the folder")
    data_files = {}
    if splits:
        check_split(dataset, split, role, top)
        # Left to itself, `datasets` also puts train/test-0.parquet into the test split.
        data_files = {"data_files": {name: f"{name}/**" for name in splits}}
    with tempfile.TemporaryDirectory() as aside:
        found = _load(dataset, role, lambda: _builder(dataset, path=str(root), cache_dir=aside, **data_files))
    source = _by_split(dataset, split, role, found.config.data_files, scratch)
    known = {*_BUILDERS, *suffixes()}
    read = {os.path.realpath(file) for names in source.files.values() for file in names}
    unread = [f for f in inside if Path(f).suffix.lower() in known and os.path.realpath(root / f) not in read]
    said = f"{dataset.path}: not read beside the tables{kinds(unread)}"
    notes = [Note("unread", len(unread), said)] if unread else []
    for name in map(str, (dataset.train, dataset.test)):
        parts = [Path(file).name for file in source.files.get(name, ())]
        if len(parts) > 1 and not all(re.search(r"\d$", Path(part).stem) for part in parts):
            text = f"{dataset.path}: split {name!r} is all that {len(parts)} files hold: {some(parts)}"
            notes.append(Note("merged-files", len(parts), text))
    outside = [
        file for file in tree.files if not file.startswith((*starts, ".")) and Path(file).suffix.lower() in known
    ]
    return source._replace(notes=tuple(notes), others=(*dict.fromkeys(file.split("/")[0] for file in outside),))


def _by_split(
    dataset: Dataset, split: Split, role: str, files: Mapping[str, list[str]], scratch: Path | None
) -> Source:
    """The train split and `split`, each built alone: together, the library takes one's class names for the other's."""
    tables: dict[str, Any] = {}
    for which in {"train": None, split: None}:
        check_split(dataset, which, role, files)
        name = getattr(dataset, which)
        check_shards(role, files[name])
        if scratch is None:
            features = read_features(files[name][0])
            column = _columns(dataset, role, features)[1]
            tables[name] = Labels(features, _load(dataset, role, partial(read_column, files[name], column)))
        else:
            kind = _BUILDERS[Path(files[name][0]).suffix.lower()]
            tables |= _build(dataset, role, "", path=kind, data_files={name: files[name]}, cache_dir=str(scratch))
    return Source(tables, files)


def opened(dataset: Dataset, split: Split, role: str, source: Source) -> Rows:
    """A split, its labels numbered by its own classes."""
    check_split(dataset, split, role, source.tables)
    name = getattr(dataset, split)
    numbers, classes = labels(dataset, split, role, source)
    table, place = source.tables[name], _place(dataset, split, source.files.get(name, []))
    image = _columns(dataset, role, table.features)[0]
    pictures = (lambda rows: []) if isinstance(table, Labels) else _reader(dataset, role, table, image, place)
    splits = *map(str, source.tables), *map(str, source.files), *source.others
    return Rows(numbers, classes, pictures, place, source.notes if split == "train" else (), splits)


def labels(dataset: Dataset, split: Split, role: str, source: Source) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [N], and the classes that they number: the ClassLabel's names, else the sorted values."""
    from datasets import ClassLabel

    check_split(dataset, split, role, source.tables)
    table = source.tables[getattr(dataset, split)]
    column = _columns(dataset, role, table.features)[1]
    feature = table.features[column]
    values = table.data.column(column).to_pylist()
    missing = {value for value in values if unlabelled(value)}
    if isinstance(feature, ClassLabel):
        index: dict[Any, int] = {number: number for number in range(len(feature.names))}
        classes = tuple(feature.names)
    elif re.fullmatch(r"u?int\d+|(large_)?string", str(getattr(feature, "dtype", ""))):
        known = sorted(set(values) - missing)
        index = {value: number for number, value in enumerate(known)}
        classes = tuple(str(value) for value in known)
    else:
        raise DataError(
            f"data.{role}.label: {column!r} of {dataset.path} is {feature}, not ClassLabel, integer or text"
        )
    index.update(dict.fromkeys(missing, -1))
    for row, value in enumerate(values):
        if value not in index:
            place = _place(dataset, split, source.files.get(getattr(dataset, split), []))(row)
            raise DataError(f"{place}: label {value!r} is none of the {len(classes)} classes")
    return np.array([index[value] for value in values], np.int64), classes


def _place(dataset: Dataset, split: Split, files: list[str]) -> Callable[[int], str]:
    """How an error names a row: by its file and its number there, where that is known."""
    if not files or (len(files) > 1 and any(Path(file).suffix.lower() != ".parquet" for file in files)):
        return partial(where, dataset, split)
    from pyarrow import parquet

    ends = np.cumsum([parquet.read_metadata(file).num_rows for file in files[:-1]])

    def place(row: int) -> str:
        number = int(np.searchsorted(ends, row, "right"))
        return f"{files[number]}, row {row - (int(ends[number - 1]) if number else 0)}"

    return place


def _build(dataset: Dataset, role: str, hint: str, **arguments: Any) -> Mapping[str, Any]:
    def build() -> Mapping[str, Any]:
        builder = _builder(dataset, **arguments)
        builder.download_and_prepare()
        return builder.as_dataset()

    return _load(dataset, role, build, hint)


def _builder(dataset: Dataset, **arguments: Any) -> Any:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    builder = datasets.load_dataset_builder(**arguments)
    # Out of reach of the hub, `datasets` takes any revision that it has on disk (huggingface/datasets#7928).
    if isinstance(builder, Cache) and dataset.revision not in (None, builder.hash):
        raise DataError(
            f"{dataset.path} at revision {dataset.revision!r} is out of reach; the copy on disk is of {builder.hash!r}"
        )
    files = builder.config.data_files or {}
    both = {*files.get(dataset.train, ())} & {*files.get(dataset.test, ())}
    if dataset.train != dataset.test and both:
        raise DataError(
            f"{dataset.path}: {min(both)} would be in both splits, {dataset.train!r} and {dataset.test!r}; "
            "name folders and files after their split only"
        )
    return builder


def _load(dataset: Dataset, role: str, load: Callable[[], Any], hint: str = "") -> Any:
    try:
        with _silence():
            tables = load()
    except DtlError:
        raise
    # datasets, huggingface_hub, httpx, fsspec and pyarrow raise out of a dozen unrelated trees.
    except Exception as error:
        stop.obey()
        # The library wraps what went wrong into "An error occurred while generating the dataset".
        cause: BaseException = error
        while type(cause).__name__.startswith("DatasetGeneration") and cause.__cause__:
            cause = cause.__cause__
        reason = " ".join((str(cause) or type(cause).__name__).split())[:300]
        raise DataError(f"data.{role}.path: {dataset.path} could not be loaded: {reason}{hint}") from error
    stop.obey()
    return tables


def _saved(folder: Path) -> Any:
    from datasets import load_from_disk

    return load_from_disk(str(folder)).with_format(None)


@contextmanager
def _silence() -> Iterator[None]:
    """Progress is the caller's to show, and what goes wrong is said once, by us."""
    import datasets
    from huggingface_hub import utils as hub

    shown = not datasets.are_progress_bars_disabled(), not hub.are_progress_bars_disabled()
    said = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(said)
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            hub.enable_progress_bars()


def _columns(dataset: Dataset, role: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the image and the label column."""
    from datasets import ClassLabel, Image

    image = _column(dataset, role, features, "image", Image)
    return image, _column(dataset, role, features, "label", ClassLabel)


def _column(
    dataset: Dataset, role: str, features: Mapping[str, Any], key: Literal["image", "label"], kind: type
) -> str:
    name, known = getattr(dataset, key), ", ".join(features)
    if name in features:
        return name
    if name is not None:
        raise DataError(
            f"data.{role}.{key}: {dataset.path} has no column {name!r}{nearest(name, features)} (columns: {known})"
        )
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        raise DataError(
            f"{dataset.path}: {len(found) or 'no'} columns of type {kind.__name__}, so the {key} column cannot be "
            f"guessed; set data.{role}.{key} (columns: {known})"
        )
    return found[0]


def _reader(
    dataset: Dataset, role: str, table: Any, column: str, place: Callable[[int], str]
) -> Callable[[Sequence[int]], list]:
    import datasets

    try:
        # Decoding is left to us, so that an error can name the row.
        table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except DtlError:
        raise
    except Exception as error:  # pyarrow's casts raise TypeError, ValueError and its own
        raise DataError(
            f"data.{role}.image: column {column!r} of {dataset.path} is {table.features[column]}, not images"
        ) from error

    def read(row: int, value: dict[str, Any] | None) -> bytes:
        if value and value["bytes"] is not None:
            return value["bytes"]
        if not value or value["path"] is None:
            raise DataError(f"{place(row)}: there is no image")
        try:
            return Path(value["path"]).read_bytes()
        except OSError as error:
            raise DataError(f"{place(row)}: {value['path']}: {error.strerror}") from error

    return lambda numbers: [read(n, value) for n, value in zip(numbers, table[list(numbers)][column], strict=True)]

"""Opening tables with the `datasets` library: a hub id, a local folder, one local file.

The only file that knows how the library finds its files, what it raises, and where it is silently wrong.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtlctl.console import stop
from dtlctl.data.classes import numbered, some
from dtlctl.data.dataset import Asked, Dataset, Note, Rows, Split, unlabelled
from dtlctl.data.files import Tree, kinds, read_file, suffixes
from dtlctl.data.lists import LISTS, refuse_splits
from dtlctl.data.shards import Files
from dtlctl.errors import DataError, DtlError, nearest, one_line

if TYPE_CHECKING:
    from datasets import Dataset as HubDataset

SUFFIXES = (".parquet", ".arrow")
"""Of files that hold rows of images."""
_SPLIT_COLUMNS = ("split", "subset", "set", "partition", "phase", "usage")
"""Names, in any case, of a column that may say which split a row is of."""


class Tables:
    """What the library made of a dataset: a table a split, of local files none before it is needed.

    All raise DataError.
    """

    def __init__(
        self,
        asked: Asked,
        tables: Mapping[str, Files | HubDataset],
        names: Sequence[str] = (),  # of splits, where they are others than of tables
        notes: Sequence[Note] = (),
        others: Sequence[str] = (),  # files and folders of tables or images that belong to no split of the recipe
        of_hub: bool = False,
    ):
        self.of_hub = of_hub
        self.asked, self.tables, self.names, self.notes, self.others = asked, tables, names, tuple(notes), others
        self.labels, self.place = cache(self._labels), cache(self._place)

    def rows(self, split: Split, scratch: Path | None) -> Rows:
        """A split, its labels numbered by its own classes. scratch: for its images; without it there are none."""
        numbers, classes = self.labels(split)
        table, place = self.tables[self.asked.name(split)], self.place(split)
        notes, splits = self.notes if split == "train" else (), (*self.tables, *self.others)
        rows = Rows(numbers, classes, lambda rows: [], place, notes, splits)
        if not scratch:
            return rows
        loaded: Any = table
        if isinstance(table, Files):
            kind = Path(table.files[0]).suffix.lower().removeprefix(".")
            files, folder = {"rows": table.files}, str(scratch)
            loaded = _build(self.asked, path=kind, data_files=files, cache_dir=folder)["rows"]
        return rows._replace(pictures=_reader(self.asked, loaded, _columns(self.asked, table.features)[0], place))

    def _labels(self, split: Split) -> tuple[np.ndarray, tuple[str, ...]]:
        """int64 [N], and the classes that they number: the ClassLabel's names, else the sorted values."""
        from datasets import ClassLabel

        for names in filter(None, (self.names, self.tables)):
            self.asked.check(split, names)
        table = self.tables[self.asked.name(split)]
        column = _columns(self.asked, table.features)[1]
        feature = table.features[column]
        if not self.of_hub:  # it says by itself which rows its splits have
            self._refuse_splits(table, column)
        with _library(self.asked):
            values = (table if isinstance(table, Files) else table.data).column(column).to_pylist()
        labels = [None if unlabelled(value) else value for value in values]
        if isinstance(feature, ClassLabel):
            numbers = np.array([-1 if label is None else label for label in labels], np.int64)
            if len(strange := np.flatnonzero(numbers >= len(feature.names))):
                said = f"label {numbers[strange[0]]} is none of the {len(feature.names)} classes"
                raise DataError(f"{self.place(split)(int(strange[0]))}: {said}")
            return numbers, tuple(feature.names)
        if re.fullmatch(r"u?int\d+|(large_)?string", str(getattr(feature, "dtype", ""))):
            return numbered(labels)
        raise DataError(
            f"data.{self.asked.role}.label: {column!r} of {self.asked.dataset.path} is {feature}, not ClassLabel, "
            "integer or text"
        )

    def _refuse_splits(self, table: Files | HubDataset, label: str) -> None:
        """As a list is refused."""
        columns = {}
        for name, feature in table.features.items():
            names = dict(enumerate(getattr(feature, "names", ())))  # of a ClassLabel
            text = names or getattr(feature, "dtype", None) in ("string", "large_string")
            if text and name != label and name.casefold() in _SPLIT_COLUMNS:
                with _library(self.asked):
                    values = (table if isinstance(table, Files) else table.data).column(name).unique().to_pylist()
                columns[name] = [names.get(value, value) for value in values]
        place = table.files[0] if isinstance(table, Files) else self.asked.dataset.path
        refuse_splits(self.asked, place, "table", columns)

    def _place(self, split: Split) -> Callable[[int], str]:
        """How an error names a row: by its file and its number there, where that is known."""
        table = self.tables[self.asked.name(split)]
        files = table.files if isinstance(table, Files) else []
        if not files or (len(files) > 1 and any(Path(file).suffix.lower() != ".parquet" for file in files)):
            return partial(self.asked.where, split)
        from pyarrow import parquet

        ends = np.cumsum([parquet.read_metadata(file).num_rows for file in files[:-1]])

        def place(row: int) -> str:
            number = int(np.searchsorted(ends, row, "right"))
            return f"{files[number]}, row {row - (int(ends[number - 1]) if number else 0)}"

        return place


def from_hub(asked: Asked) -> Tables:
    """Raises DataError, as all here do."""
    hint, dataset = "; check the id, config and revision, the network, and HF_HUB_OFFLINE and HF_HOME", asked.dataset
    found = _build(asked, hint, path=dataset.path, name=dataset.config, revision=dataset.revision)
    return Tables(asked, {str(name): table for name, table in found.items()}, of_hub=True)


def from_file(asked: Asked, root: Path) -> Tables:
    """A parquet or arrow file: the split "train"."""
    if root.suffix.lower() not in SUFFIXES:
        hint = "; write the folder that holds it" if root.suffix.lower() in (*LISTS, ".tar") else kinds([root.name])
        raise DataError(f"data.{asked.role}.path: {root} is neither a folder nor a .parquet or .arrow file{hint}")
    return Tables(asked, {"train": Files(asked.role, [str(root)])})


def from_folder(asked: Asked, tree: Tree) -> Tables | None:
    """What `save_to_disk` wrote, or parquet and arrow files; None of a folder that has neither."""
    dataset, root, top = asked.dataset, tree.root, [folder for folder in tree.folders if "/" not in folder]
    if saved := [name for name in ("", *top) if {"state.json", "dataset_info.json"} <= {*os.listdir(root / name)}]:
        from datasets import load_from_disk

        with _library(asked):
            found = {name: load_from_disk(str(root / name)).with_format(None) for name in saved}
        return Tables(asked, {name or "train": table for name, table in found.items()})
    splits = [name for name in (dataset.train, str(dataset.test)) if name in top]
    starts = tuple(f"{name}/" for name in splits) or ("",)
    inside = [file for file in tree.files if file.startswith(starts)]
    if not any(file.lower().endswith(SUFFIXES) for file in inside):
        return None
    if glob := set(str(root)) & set("*?[]"):
        raise DataError(
            f"data.{asked.role}.path: {root} holds {min(glob)!r}, which reads as a pattern; rename the folder"
        )
    # Left to itself, `datasets` also puts train/test-0.parquet into the test split.
    data_files = {"data_files": {name: f"{name}/**" for name in splits}} if splits else {}
    with tempfile.TemporaryDirectory() as aside, _library(asked):
        builder = _builder(dataset, path=str(root), cache_dir=aside, **data_files)
    tables = {str(name): Files(asked.role, files) for name, files in builder.config.data_files.items()}
    known = {*SUFFIXES, *suffixes()}
    read = {os.path.realpath(file) for table in tables.values() for file in table.files}
    unread = [f for f in inside if Path(f).suffix.lower() in known and os.path.realpath(root / f) not in read]
    said = f"{dataset.path}: not read beside the tables{kinds(unread)}"
    notes = [Note("unread", len(unread), said)] if unread else []
    for name in (name for name in (dataset.train, dataset.test) if name in tables):
        parts = [Path(file).name for file in tables[name].files]
        if len(parts) > 1 and not all(re.search(r"\d$", Path(part).stem) for part in parts):
            text = f"{dataset.path}: split {name!r} is all that {len(parts)} files hold: {some(parts)}"
            notes.append(Note("merged-files", len(parts), text))
    outside = [f for f in tree.files if not f.startswith((*starts, ".")) and Path(f).suffix.lower() in known]
    return Tables(asked, tables, top if splits else (), notes, [*dict.fromkeys(f.split("/")[0] for f in outside)])


def _build(asked: Asked, hint: str = "", **arguments: Any) -> Mapping[str, Any]:
    with _library(asked, hint):
        builder = _builder(asked.dataset, **arguments)
        builder.download_and_prepare()
        return builder.as_dataset()


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


@contextmanager
def _library(asked: Asked, hint: str = "") -> Iterator[None]:
    """Progress is the caller's to show, and what goes wrong is said once, by us, as a DataError."""
    import datasets
    from huggingface_hub import utils as hub

    shown: list[Any] = [library for library in (datasets, hub) if not library.are_progress_bars_disabled()]
    with ExitStack() as afterwards:
        afterwards.callback(datasets.logging.set_verbosity, datasets.logging.get_verbosity())
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        for library in shown:
            afterwards.callback(library.enable_progress_bars)
            library.disable_progress_bars()
        try:
            yield
        except DtlError:
            raise
        # datasets, huggingface_hub, httpx, fsspec and pyarrow raise out of a dozen unrelated trees.
        except Exception as error:
            stop.obey()
            # The library wraps what went wrong into "An error occurred while generating the dataset".
            cause: BaseException = error
            while type(cause).__name__.startswith("DatasetGeneration") and cause.__cause__:
                cause = cause.__cause__
            said = f"data.{asked.role}.path: {asked.dataset.path} could not be loaded: {one_line(cause)}{hint}"
            raise DataError(said) from error
    stop.obey()


def _columns(asked: Asked, features: Mapping[str, Any]) -> tuple[str, str]:
    """The names of the image and the label column: the recipe's, or the only ones of their types."""
    from datasets import ClassLabel, Image

    names, path, known = list[str](), asked.dataset.path, ", ".join(features)
    for key, kind in (("image", Image), ("label", ClassLabel)):
        name, where = getattr(asked.dataset, key), f"data.{asked.role}.{key}"
        if name not in (None, *features):
            hint = nearest(name, features)
            raise DataError(f"{where}: {path} has no column {name!r}{hint} (columns: {known})")
        found = [name] if name else [column for column, feature in features.items() if isinstance(feature, kind)]
        if len(found) != 1:
            raise DataError(
                f"{path}: {len(found) or 'no'} columns of type {kind.__name__}, so the {key} column cannot be "
                f"guessed; set {where} (columns: {known})"
            )
        names += found
    return names[0], names[1]


def _reader(asked: Asked, table: Any, column: str, place: Callable[[int], str]) -> Callable[[Sequence[int]], list]:
    import datasets

    try:
        # Decoding is left to us, so that an error can name the row.
        table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except DtlError:
        raise
    except Exception as error:  # pyarrow's casts raise TypeError, ValueError and its own
        said = f"column {column!r} of {asked.dataset.path} is {table.features[column]}, not images"
        raise DataError(f"data.{asked.role}.image: {said}") from error

    def read(row: int, value: dict[str, Any] | None) -> bytes:
        if value and value["bytes"] is not None:
            return value["bytes"]
        if not value or value["path"] is None:
            raise DataError(f"{place(row)}: there is no image")
        return read_file(Path(value["path"]), f"{place(row)}: {value['path']}")

    return lambda numbers: [read(n, value) for n, value in zip(numbers, table[list(numbers)][column], strict=True)]

"""Opening tables with the `datasets` library: a hub id, a local folder, one local file.

The only file that knows how the library finds its files, what it raises, and where it is silently wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtlctl.console import stop
from dtlctl.data.dataset import Dataset, Split
from dtlctl.errors import DataError, DtlError, nearest


def from_hub(dataset: Dataset, split: Split, role: str) -> Mapping[str, Any]:
    """A `datasets.Dataset` for each split, `split` among them. Raises DataError."""
    hint = "; check the id, config and revision, the network, and HF_HUB_OFFLINE and HF_HOME"
    tables = _build(dataset, role, hint, path=dataset.path, name=dataset.config, revision=dataset.revision)
    check_split(dataset, split, role, tables)
    return tables


def from_files(dataset: Dataset, split: Split, role: str, root: Path, scratch: Path) -> Mapping[str, Any]:
    """The same of the local file or folder `root`. It is converted inside `scratch`: nothing is left elsewhere."""
    tables = _build(dataset, role, "", **_data_files(dataset, split, role, root), cache_dir=str(scratch))
    check_split(dataset, split, role, tables)
    return tables


def check_split(dataset: Dataset, split: Split, role: str, names: Iterable[str]) -> None:
    """Raise DataError unless the split that `split` stands for is among `names`."""
    wanted, names = getattr(dataset, split), sorted(names)
    if wanted not in names:
        raise DataError(
            f"data.{role}.{split}: {dataset.path} has no split {wanted!r}{nearest(wanted, names)} "
            f"(splits: {', '.join(names)})"
        )


def _data_files(dataset: Dataset, split: Split, role: str, root: Path) -> dict[str, Any]:
    if glob := set(str(root)) & set("*?[]"):
        raise DataError(f"data.{role}.path: {root} holds {min(glob)!r}, which reads as a pattern; rename the folder")
    if root.is_file():
        builder = {".parquet": "parquet", ".arrow": "arrow"}.get(root.suffix)
        if builder is None:
            raise DataError(f"data.{role}.path: {root} is neither a folder nor a .parquet or .arrow file")
        return {"path": builder, "data_files": {"train": str(root)}}
    folders = {name for name in (dataset.train, dataset.test) if (root / name).is_dir()}
    if not folders:
        return {"path": str(root)}
    # Left to itself, `datasets` also puts train/test-tube/1.png into the test split, and lets an unlabelled folder
    # beside the two take the labels away from both.
    check_split(dataset, split, role, folders | {f.name for f in root.iterdir() if f.is_dir()})
    return {"path": str(root), "data_files": {name: f"{name}/**" for name in sorted(folders)}}


def _build(dataset: Dataset, role: str, hint: str, **arguments: Any) -> Mapping[str, Any]:
    import datasets

    try:
        with _no_bars():
            builder = datasets.load_dataset_builder(**arguments)
            _check_builder(dataset, builder)
            builder.download_and_prepare()
            tables = builder.as_dataset()
    except DtlError:
        raise
    # datasets, huggingface_hub, httpx, fsspec and pyarrow raise out of a dozen unrelated trees.
    except Exception as error:
        stop.obey()
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise DataError(f"data.{role}.path: {dataset.path} could not be loaded: {reason}{hint}") from error
    stop.obey()
    return tables


def _check_builder(dataset: Dataset, builder: Any) -> None:
    from datasets.packaged_modules.cache.cache import Cache

    # Out of reach of the hub, `datasets` takes any revision that it has on disk (huggingface/datasets#7928).
    if isinstance(builder, Cache) and dataset.revision not in (None, builder.hash):
        raise DataError(
            f"{dataset.path} at revision {dataset.revision!r} is out of reach; the copy on disk is of {builder.hash!r}"
        )
    files = builder.config.data_files or {}
    train, test = (
        {f for f in files.get(name, ()) if not os.path.basename(f).startswith("metadata.")}
        for name in (dataset.train, dataset.test)
    )
    if dataset.train != dataset.test and (both := train & test):
        raise DataError(
            f"{dataset.path}: {min(both)} would be in both splits, {dataset.train!r} and {dataset.test!r}; "
            "name folders and files after their split only"
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Progress is the caller's to show."""
    import datasets
    from huggingface_hub import utils as hub

    shown = not datasets.are_progress_bars_disabled(), not hub.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    hub.disable_progress_bars()
    try:
        yield
    finally:
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            hub.enable_progress_bars()

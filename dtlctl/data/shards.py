"""Parquet and arrow files as they lie on the disk: what they say of themselves before the rows are read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from dtlctl.errors import DataError


def read_features(file: str) -> Mapping[str, Any]:
    """The columns of a file, as the library describes them."""
    from datasets import Features
    from pyarrow import parquet

    if file.lower().endswith(".parquet"):
        return Features.from_arrow_schema(parquet.read_schema(file))
    return Features.from_arrow_schema(_mapped(file).schema)


def read_column(files: Sequence[str], column: str) -> Any:
    """An arrow table of one column of these files."""
    import pyarrow
    from pyarrow import parquet

    parts = [
        parquet.ParquetFile(file).read(columns=[column])
        if file.lower().endswith(".parquet")
        else _mapped(file).read_all().select([column])
        for file in files
    ]
    return pyarrow.concat_tables(parts)


def _mapped(file: str) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(file))


def check_shards(role: str, files: Sequence[str]) -> None:
    """Raise DataError unless all files of a split name their classes alike: the library takes the first one's names."""
    from datasets import ClassLabel

    first = None
    for file in files:
        try:
            names = {c: f.names for c, f in read_features(file).items() if isinstance(f, ClassLabel)}
        except Exception as error:  # pyarrow raises OSError, ValueError and its own
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"data.{role}.path: {file} could not be loaded: {reason}") from error
        if first is None:
            first = names
        elif names != first:
            raise DataError(
                f"{file}: other class names, or in another order, than in {files[0]}: {names}, there {first}"
            )


@lru_cache(maxsize=1024)
def files_in(table: Path, image: str | None, changed: int) -> tuple[str, ...]:
    """Files that cells of a parquet or arrow file name instead of holding an image; of a file that is none, nothing.

    image: the recipe's column. changed: the time of the file, for what is known of it is kept.
    """
    import pyarrow
    from pyarrow import parquet

    found: set[str] = set()
    with suppress(OSError, pyarrow.ArrowException):  # told when it is opened
        packed = table.suffix.lower() == ".parquet"
        whole = None if packed else _mapped(str(table)).read_all()
        for field in whole.schema if whole else parquet.read_schema(table):
            cells = pyarrow.types.is_struct(field.type) and {"bytes", "path"} <= {part.name for part in field.type}
            if not cells and (field.name != image or str(field.type) not in ("string", "large_string")):
                continue
            if cells and packed and not _holes(parquet.read_metadata(table), f"{field.name}.bytes"):
                continue
            name = f"{field.name}.path" if cells else field.name
            column = whole[field.name] if whole else parquet.ParquetFile(table).read(columns=[name])[field.name]
            for part in column.chunks:
                found |= {*map(str, (part.field("path") if cells else part).to_pylist())}
    return tuple(sorted(path for path in found if os.path.isfile(path)))


def _holes(metadata: Any, column: str) -> bool:
    """Whether a column of a parquet file may lack values, by what the file says of its parts."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    parts = [group.column(number) for group in groups for number in range(group.num_columns)]
    found = [part.statistics for part in parts if part.path_in_schema == column]
    return any(known is None or not known.has_null_count or known.null_count for known in found)

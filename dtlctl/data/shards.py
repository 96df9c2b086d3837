"""Parquet and arrow files as they lie on the disk: what they say of themselves before the rows are read."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

from dtlctl.errors import DataError, one_line


class Files:
    """Those of one split. Columns are read where they lie; rows of images need a copy, which `tables` makes."""

    def __init__(self, role: str, files: list[str]):
        self.role, self.files = role, files

    @cached_property
    def features(self) -> Mapping[str, Any]:
        """The columns, as the library describes them, which takes the class names of the first file.

        Raises DataError unless all name their classes alike.
        """
        from datasets import ClassLabel, Features

        found: dict[str, Mapping[str, Any]] = {}
        for file in self.files:
            try:
                found[file] = Features.from_arrow_schema(_opened(file)[0])
            except Exception as error:  # pyarrow raises OSError, ValueError and its own
                raise DataError(f"data.{self.role}.path: {file} could not be loaded: {one_line(error)}") from error
            names, first = (
                {name: column.names for name, column in found[one].items() if isinstance(column, ClassLabel)}
                for one in (file, self.files[0])
            )
            if names != first:
                said = "other class names, or in another order, than in"
                raise DataError(f"{file}: {said} {self.files[0]}: {names}, there {first}")
        return found[self.files[0]]

    def column(self, name: str) -> Any:
        """As arrow has it, and with what pyarrow raises."""
        import pyarrow

        return pyarrow.concat_tables([_opened(file)[1](name) for file in self.files]).column(name)


def _opened(file: str) -> tuple[Any, Callable[[str], Any]]:
    """What a file says of its columns, and a function that reads one of them, of parquet a part of one too."""
    import pyarrow
    from pyarrow import parquet

    if file.lower().endswith(".parquet"):
        found = parquet.ParquetFile(file)
        return found.schema_arrow, lambda column: found.read(columns=[column])
    try:
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all()
    except (OSError, pyarrow.ArrowInvalid):  # arrow has a format for files too
        table = pyarrow.ipc.open_file(pyarrow.memory_map(file)).read_all()
    return table.schema, lambda column: table.select([column])


def files_in(file: str, image: str | None) -> set[str]:
    """Files that cells of a parquet or arrow file name instead of holding an image. image: the recipe's column."""
    import pyarrow
    from pyarrow import parquet

    found: set[str] = set()
    packed = file.lower().endswith(".parquet")
    with suppress(OSError, pyarrow.ArrowException):  # told when it is opened
        schema, read = _opened(file)
        for field in schema:
            cells = pyarrow.types.is_struct(field.type) and {"bytes", "path"} <= {part.name for part in field.type}
            if not cells and (field.name != image or str(field.type) not in ("string", "large_string")):
                continue
            if cells and packed and not _holes(parquet.read_metadata(file), f"{field.name}.bytes"):
                continue
            column = read(f"{field.name}.path" if cells and packed else field.name)[field.name]
            for part in column.chunks:
                found |= {*map(str, (part.field("path") if cells else part).to_pylist())}
    return {path for path in found if os.path.isfile(path)}


def _holes(metadata: Any, column: str) -> bool:
    """Whether a column of a parquet file may lack values, by what the file says of its parts."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    parts = [group.column(number) for group in groups for number in range(group.num_columns)]
    found = [part.statistics for part in parts if part.path_in_schema == column]
    return any(known is None or not known.has_null_count or known.null_count for known in found)

"""Finished parts of a job that is not: small JSON files, so that a stop costs what was at work and no more."""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from dtlctl.errors import CheckpointError, DivergedError, one_line
from dtlctl.storage import checkpoint

Part = TypeVar("Part")


class Parts:
    """Parts in one folder, valid for one key (what they depend on besides their names).

    form: a part's type, of what JSON has, named tuples and dataclasses. Raises CheckpointError, and DivergedError for a
    part with a number that is not finite.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.made: list[str] = []
        """What this process made alone, because it was not there."""

    def each(
        self, name: str, form: Any, tasks: Iterable[Callable[[], Part]], cut_short: Callable[[], bool]
    ) -> list[Callable[[], Part]]:
        """The tasks, made to keep their results, unless `cut_short` then says that they are no whole ones."""
        return [partial(self._own, f"{name}-{number}", form, task, cut_short) for number, task in enumerate(tasks)]

    def _own(self, name: str, form: Any, make: Callable[[], Part], cut_short: Callable[[], bool]) -> Part:
        if (found := self._read(name, form)) is None:
            found = make()
            self.made.append(name)
            if not cut_short():
                self._write(name, found)
        return found

    def common(self, group: Any, name: str, form: Any, make: Callable[[], Part]) -> Part:
        """A part that all processes of a group (the engine) make together; what the main one has of it is kept."""
        found = self._read(name, form)
        if group.agree(found is None) or found is None:
            found = made = make()
            group.by_main(lambda: self._write(name, made))
        return found

    def has(self, name: str, form: Any) -> bool:
        return self._read(name, form) is not None

    def count(self) -> int:
        return sum(self.has(path.stem, Any) for path in self.folder.glob("*.json"))

    def adopt(self, folder: Path) -> None:
        """Copy what another folder has for our key and this one lacks."""
        theirs = Parts(folder, self.key)
        for path in sorted(folder.glob("*.json")):
            with suppress(CheckpointError):  # damaged there, or not to be written here: then it is made anew
                if not self.has(path.stem, Any) and theirs.has(path.stem, Any):
                    checkpoint.write(self._path(path.stem), path.read_bytes())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _write(self, name: str, part: Any) -> None:
        try:
            text = json.dumps({"key": self.key, "part": part}, default=asdict, ensure_ascii=False, allow_nan=False)
        except ValueError:
            raise DivergedError(f"{self._path(name)}: a number of this result is not finite; nothing is kept") from None
        checkpoint.write(self._path(name), text.encode())

    def _read(self, name: str, form: Any) -> Any:
        try:
            document = json.loads(self._path(name).read_bytes(), parse_constant=checkpoint.finite)
            return TypeAdapter(form).validate_python(document["part"]) if document["key"] == self.key else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = one_line(error, 200)
            raise CheckpointError(f"{self._path(name)}: cannot be used: {reason}; delete it to make it again") from None

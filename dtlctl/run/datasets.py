"""The datasets of a run, by their roles: source, target, piggyback.NAME."""

import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from dtlctl.data import cache as decoded
from dtlctl.data import overlap, subset
from dtlctl.data.dataset import Note, Split
from dtlctl.data.entry import Images, Wanted
from dtlctl.data.sources import Source
from dtlctl.recipe.schema import Recipe
from dtlctl.run.processes import Processes


class Datasets:
    """Decoded when they are first asked for, by the main process, and read by all.

    Of a train split only those images are decoded for certain that the recipe's fraction draws, its `index`, sorted
    rows. Who wants to look at others asks for `whole` first.
    """

    def __init__(self, recipe: Recipe, processes: Processes):
        self.recipe, self.processes = recipe, processes
        seed = recipe.stream("subset/source")  # for test splits of all roles, which may share a dataset
        self.source = cache(lambda role: Source(recipe.data.of(role), role, seed))
        self.images = cache(self._images)
        self.index = cache(lambda role: self._draw(role, self.images(role, "train").labels, len(self.classes(role))))
        self.whole = cache(partial(self._images, split="train", whole=True))
        self.notes = cache(self._notes)
        self.left: Path | None = None
        """Where decoded images of one's own, which may be private, lie since this object asked for them."""

    def classes(self, role: str) -> tuple[str, ...]:
        return self.images(role, "train").classes

    def held_back(self, role: str) -> np.ndarray:
        """Sorted int64 rows of the train split that are not in the run's subset of it; possibly none."""
        return np.setdiff1d(self.whole(role).rows, self.index(role))

    def tested(self, role: str) -> list[str]:
        """Where every image of the test split is: a file, or a row of one. DataError where it cannot be read."""
        with tempfile.TemporaryDirectory() as folder:
            rows = self.source(role).rows("test", self.recipe.model.image_size, Path(folder))
            return [rows.place(int(row)) for row in np.flatnonzero(rows.labels >= 0)]

    def identity(self, role: str, *, beyond: bool = False) -> dict[str, Any]:
        """What the role's data is, by content; of images that were never decoded, by what is known of them.

        beyond: those of the train split outside of the subset count too, and are decoded.
        """
        train, test = self.images(role, "train"), self.images(role, "test")
        some = len(train.rows) < len(train.labels)
        return {
            "train": train.listed if some else train.fingerprint,
            "test": test.fingerprint,
            **({"drawn": train.fingerprint} if some else {}),
            **({"whole": self.whole(role).fingerprint} if some and beyond else {}),
            "index": subset.digest(self.index(role)),
            "images": len(self.index(role)),
            "test_images": len(test.labels),
            "dropped": train.dropped + test.dropped,
            "augment": self.recipe.data.of(role).augment,
        }

    def _notes(self, roles: tuple[str, ...]) -> dict[str, list[Note]]:
        """By role, each given once, what was dropped, guessed, merged, rescaled, left out of a subset, or occurs twice.

        Raises DataError where most of a test split is in its train split.
        """
        splits = {role: (self.images(role, "train"), self.images(role, "test")) for role in roles}
        found, elsewhere = dict[str, list[Note]](), overlap.across(splits)
        for role, (train, test) in splits.items():
            table, counts = self.recipe.data.of(role), np.bincount(train.labels, minlength=len(train.classes)).tolist()
            left = subset.imbalance(counts, train.classes, table.fraction, table.balance)
            own = [*train.notes, *test.notes, *filter(None, [left])]
            found[role] = own + overlap.within(role, train, test) + elsewhere[role]
        return found

    def cached(self, role: str, split: Split, whole: bool = False) -> Images | None:
        """As `images`, where nothing has to be decoded for it; else None."""
        return decoded.cached(*self._asked(role, split, whole))

    def _images(self, role: str, split: Split, whole: bool = False) -> Images:
        if self.processes.count == 1 and (images := self.cached(role, split, whole)) is not None:
            return images
        asked = self._asked(role, split, whole)
        with self.processes.progress(f"decode {role} {split}", 1) as bar:
            self.processes.by_main(lambda: decoded.load(*asked, bar.at))
        if self.source(role).kind == "local":
            self.left = decoded.folder()
        return decoded.load(*asked)

    def _asked(self, role: str, split: Split, whole: bool) -> tuple[Source, Split, int, Wanted | None]:
        return self.source(role), split, self.recipe.model.image_size, None if whole else partial(self._draw, role)

    def _draw(self, role: str, labels: np.ndarray, classes: int) -> np.ndarray:
        table, seed = self.recipe.data.of(role), self.recipe.stream(f"subset/{role}")
        return subset.draw(labels, classes, table.fraction, seed, table.balance)

"""The datasets of a run, by their roles: source, target, piggyback.NAME."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from dtlctl.data import cache as decoded
from dtlctl.data.cache import Images
from dtlctl.data.dataset import Note, Split
from dtlctl.data.subset import balanced, digest
from dtlctl.recipe.schema import Recipe
from dtlctl.run.processes import Processes


class Datasets:
    """Decoded when they are first asked for, by the main process, and read by all."""

    def __init__(self, recipe: Recipe, processes: Processes):
        self.recipe, self.processes = recipe, processes
        self.images = cache(self._images)
        self.index = cache(self._index)

    def classes(self, role: str) -> tuple[str, ...]:
        return self.images(role, "train").classes

    def identity(self, role: str) -> dict[str, Any]:
        """What the role's data is, by content: for keys and sidecars."""
        train, test = self.images(role, "train"), self.images(role, "test")
        return {
            "train": train.fingerprint,
            "test": test.fingerprint,
            "index": digest(self.index(role)),
            "images": len(self.index(role)),
            "test_images": len(test.labels),
            "dropped": train.dropped + test.dropped,
            "augment": self.recipe.data.of(role).augment,
        }

    def notes(self, role: str) -> list[Note]:
        """What was dropped, guessed, merged or rescaled while both splits were read."""
        return [*self.images(role, "train").notes, *self.images(role, "test").notes]

    def _images(self, role: str, split: Split) -> Images:
        dataset, size = self.recipe.data.of(role), self.recipe.model.image_size
        images = decoded.cached(dataset, split, size, role=role) if self.processes.count == 1 else None
        if images is None:
            with self.processes.progress(f"decode {role} {split}", 1) as bar:
                self.processes.by_main(lambda: decoded.load(dataset, split, size, role=role, progress=bar.at))
            images = decoded.load(dataset, split, size, role=role)
        for note in images.notes:
            self.processes.say(f"data.{role}: {note.text}")
        return images

    def _index(self, role: str) -> np.ndarray:
        """Sorted rows of the train split that the recipe's fraction draws."""
        train = self.images(role, "train")
        fraction = self.recipe.data.of(role).fraction
        return balanced(train.labels, len(train.classes), fraction, self.recipe.stream(f"subset/{role}"))

"""What a result's datasets were called when it was made, so that a report needs no data to tell them from others.

The key of a result knows its images by content, which nobody has at hand who only reads sidecars. So a sidecar keeps
the recipe's tables too, outside the key: the same images may well be somewhere else by now.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from pydantic import Field

from dtlctl.data.cache import Images
from dtlctl.data.dataset import Dataset
from dtlctl.data.subset import per_class
from dtlctl.recipe.plan import Job
from dtlctl.recipe.schema import Recipe
from dtlctl.strict import Strict


class Origin(Strict):
    """One dataset, as the recipe had it, and the sizes of its train split."""

    table: Dataset
    train_images: int = Field(ge=1)
    classes: int = Field(ge=1)
    smallest_class: int = Field(ge=1)

    def drawn(self, fraction: float) -> int:
        """How many images that fraction draws: as many are the same ones."""
        if fraction == 1:
            return self.train_images
        return self.classes * per_class(fraction, self.train_images, self.classes, self.smallest_class)


def of(dataset: Dataset, train: Images) -> dict[str, Any]:
    """An `Origin` as JSON, for a sidecar. train: the train split."""
    smallest = int(np.bincount(train.labels, minlength=len(train.classes)).min())
    sizes = {"train_images": len(train.labels), "classes": len(train.classes), "smallest_class": smallest}
    return {"table": dataset.model_dump(mode="json"), **sizes}


def is_other(sidecar: dict[str, Any], job: Job[Any], recipe: Recipe) -> bool:
    """Whether the result was certainly made from other images than the recipe now means, or with other augmentation.

    Certainly, because a dataset of another name may be the same one; see `renamed`. A sidecar that is older than its
    `datasets` tells the augmentation alone. Raises ValueError for what is no `Origin`.
    """
    for role in job.roles:
        now, seen = recipe.data.of(role), sidecar.get("data", {}).get(role, {})
        if seen.get("augment", now.augment) != now.augment:
            return True
        was = _origin(sidecar, role)
        if was and was.drawn(was.table.fraction) != was.drawn(now.fraction):
            return True
    return False


def renamed(sidecar: dict[str, Any], job: Job[Any], recipe: Recipe) -> dict[str, str]:
    """By role, what the recipe now calls a dataset otherwise than the result did, in words: these may be one dataset.

    Raises ValueError for what is no `Origin`.
    """
    found = {}
    for role in job.roles:
        if was := _origin(sidecar, role):
            now, aside = recipe.data.of(role), {"fraction", "augment"}
            changed = [
                name for name in Dataset.model_fields.keys() - aside if getattr(was.table, name) != getattr(now, name)
            ]
            before, after = (", ".join(_said(table, name) for name in sorted(changed)) for table in (was.table, now))
            if changed:
                found[role] = f"made with {before}; the recipe has {after}"
    return found


def _origin(sidecar: dict[str, Any], role: str) -> Origin | None:
    """What the sidecar says of the role, which may be read where the data is out of reach; nothing in older ones."""
    told = sidecar.get("datasets", {}).get(role)
    return Origin.model_validate(told, context={"finished": True}) if told else None


def _said(table: Dataset, name: str) -> str:
    value = getattr(table, name)
    return f"no {name}" if value is None else f"{name} = {json.dumps(value, ensure_ascii=False)}"

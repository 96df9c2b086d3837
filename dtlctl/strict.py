"""The base of everything a recipe can say."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Immutable settings that refuse unknown keys, wrong types and numbers that are not finite."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,  # what stands below a key is its description, in docs/recipe.md too
    )


class Algorithm(Strict):
    """Settings of something that computes results: a stage, a loss, an attacker."""

    revision: ClassVar[int] = 1
    """Raised by whoever changes what is computed under the same settings: earlier results are then made again."""

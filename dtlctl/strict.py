"""The base of everything a recipe can say."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Immutable settings that refuse unknown keys, wrong types and numbers that are not finite."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
    )

"""What all settings are made of: frozen branches that refuse unknown keys, whole numbers that are whole, numbers from YAML."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict
from pydantic_core import PydanticCustomError


def _not_a_switch(value: Any) -> Any:
    """YAML's `yes` is not 1.0. Text is welcome: YAML reads 1e-4 as text."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


Whole = Annotated[int, Strict()]
Number = Annotated[float, BeforeValidator(_not_a_switch)]


class Branch(BaseModel):
    """A group of settings."""

    # defaults are checked too: a default of 64 for a float would be another recipe than the 64.0 that a file gives
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

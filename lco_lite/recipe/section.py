"""A part of a recipe: fields with their meaning and source; unknown keys are refused."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, what: str, source: str, **bounds: Any) -> Any:
    """A field with its meaning (unit included) and where its default comes from."""
    return Field(default, description=what, json_schema_extra={"source": source}, **bounds)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

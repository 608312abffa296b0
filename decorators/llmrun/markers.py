"""Markers on the fields of ModelSpec and LoRA: what a change of an option costs, and where the option works."""

from __future__ import annotations

from enum import Enum, auto

from pydantic import BaseModel


class Marker(Enum):
    """A property of an option, written on its field: `Annotated[int, Marker.NO_RESTART]`."""

    NO_RESTART = auto()
    """Only the autoscaler and the ingress use the option: a change restarts no engine."""
    NEEDS_CONTROL = auto()
    """Only llmrun's control and ingress implement the option: it has no effect in a plain Serve application."""


def marked(model: type[BaseModel], marker: Marker) -> tuple[str, ...]:
    """Return the names of the fields that carry `marker`, in their order."""
    return tuple(name for name, field in model.model_fields.items() if marker in field.metadata)

"""The base class of what processes send each other by pickle."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any


class Message:
    """A dataclass that a process of another release may have pickled.

    Fields that it lacks get their defaults, and fields that this release does not have are dropped. So a field that is
    added later needs a default.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the fields. Raises TypeError if one without a default is missing."""
        for field in fields(self):  # type: ignore[arg-type] # subclasses are dataclasses
            if field.name in state:
                value = state[field.name]
            elif field.default is not MISSING:
                value = field.default
            elif field.default_factory is not MISSING:
                value = field.default_factory()
            else:
                raise TypeError(f"{type(self).__name__} of another release lacks the field {field.name!r}")
            object.__setattr__(self, field.name, value)  # also of frozen dataclasses

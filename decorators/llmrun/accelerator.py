"""The `accelerator=` option: kinds of GPUs in order of preference, or the CPU."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Accelerator(BaseModel):
    """What a replica runs on: `kinds` in order of preference, and `count` if it was written as `KIND:N`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kinds: tuple[str, ...]
    count: int | None = None

    def __str__(self) -> str:
        suffix = f":{self.count}" if self.count else ""
        return ", ".join(kind + suffix for kind in self.kinds)


def parse_accelerator(value: Any) -> Any:
    """Turn `"A10G:2"` or a list of such names into the fields of Accelerator, for pydantic. Raises ValueError."""
    if value is None or isinstance(value, dict):
        return value
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"accelerator={value!r}: must be a name like 'A10G', 'A10G:2' or 'cpu', or a list of names")  # noqa: TRY004
    names = [value] if isinstance(value, str) else list(value)
    if not names:
        raise ValueError("accelerator=[]: at least one name is required; omit the option for any GPU")
    kinds: list[str] = []
    counts: set[int] = set()
    for name in names:
        kind, colon, count = str(name).partition(":")
        if not kind or (colon and not (count.isdigit() and int(count) > 0)):
            raise ValueError(f"accelerator={name!r}: must be a name, or a name and a number, like 'A10G:2'")
        kinds.append(kind)
        if colon:
            counts.add(int(count))
    if len(counts) > 1:
        raise ValueError(f"accelerator={names!r}: every kind needs the same number of GPUs")
    if "cpu" in kinds and (len(kinds) > 1 or counts):
        raise ValueError(f"accelerator={names!r}: 'cpu' cannot be combined; use cpus= for the number of cores")
    return {"kinds": kinds, "count": counts.pop() if counts else None}

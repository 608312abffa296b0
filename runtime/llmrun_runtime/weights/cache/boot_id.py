"""The machine's boot id: bytes that an earlier boot wrote without a sync may never have reached the disk."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """Return Linux's id of this boot; a constant where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"

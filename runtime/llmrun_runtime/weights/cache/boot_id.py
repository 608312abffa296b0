"""Which boot of the machine this is: what an earlier one wrote and did not sync may never have reached the disk."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """Linux's name for this boot; the same for ever where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"

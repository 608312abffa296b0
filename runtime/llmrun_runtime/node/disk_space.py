"""Free space on the disks that a node writes to."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmrun.settings import Settings

# A start writes logs, sockets and small temporary files. With less, it fails halfway, with an error that names no disk.
MIN_FREE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Disk:
    """The size of the file system of a folder, in bytes."""

    path: str
    free: int
    total: int


def measure_disks(settings: Settings) -> list[Disk]:
    """The file systems of the home, the weights and the folder for temporary files, each once."""
    disks: dict[int, Disk] = {}
    for folder in (settings.root, settings.weights_root, Path(tempfile.gettempdir())):
        existing = _existing(folder)
        usage = shutil.disk_usage(existing)
        if usage.total:
            disks.setdefault(existing.stat().st_dev, Disk(str(folder), usage.free, usage.total))
    return list(disks.values())


def lack_of_space(settings: Settings) -> str:
    """Why nothing can start on this node: its home or its folder for temporary files is full; "" if neither is."""
    for folder in (settings.root, Path(tempfile.gettempdir())):
        free = shutil.disk_usage(_existing(folder)).free
        if free < MIN_FREE_BYTES:
            return f"{folder} has only {free // 2**20} MiB free. Free space, then try again"
    return ""


def _existing(folder: Path) -> Path:
    """The folder, or its closest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())

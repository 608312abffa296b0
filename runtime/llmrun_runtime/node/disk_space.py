"""Free space on the disks that a node writes to."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from llmrun.settings import Settings

# A start writes logs, sockets and small temporary files. With less, it fails halfway, with an error that names no disk.
MIN_FREE_BYTES = 16 * 2**20


def lack_of_space(settings: Settings) -> str:
    """Why nothing can start on this node: its home or its folder for temporary files is full; "" if neither is."""
    for folder in (settings.root, Path(tempfile.gettempdir())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < MIN_FREE_BYTES:
            return f"{folder} has only {free // 2**20} MiB free. Free space, then try again"
    return ""

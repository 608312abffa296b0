"""An engine's own temporary folder. Whoever owns it holds a lock on it, so that those of killed owners can be told."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

PREFIX = "llmrun-engine-"


@dataclass(frozen=True)
class TempDir:
    """The folder, and the descriptor that holds its lock: it goes with the folder to another process."""

    path: Path
    lock: int

    @classmethod
    def make(cls) -> TempDir:
        """An empty one; those whose owners were killed are removed. Raises OSError."""
        sweep_temp_dirs()
        new = Path(tempfile.mkdtemp(prefix="llmrun-new-"))
        lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = new.with_name(new.name.replace("llmrun-new-", PREFIX))  # only what is locked has that name
        new.rename(path)
        return cls(path, lock)

    def remove(self) -> None:
        """It, and what the engine left there."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def sweep_temp_dirs() -> None:
    """Remove the folders whose owners were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # gone by now, or another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)

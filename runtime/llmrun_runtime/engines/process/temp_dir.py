"""A temporary folder for one engine. Its owner holds a lock on it, which tells folders of killed owners apart."""

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
    """The folder, and the descriptor that holds its lock. Both can be passed to another process."""

    path: Path
    lock: int

    @classmethod
    def make(cls) -> TempDir:
        """Create an empty folder. Raises OSError."""
        new = Path(tempfile.mkdtemp(prefix="llmrun-new-"))
        lock = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = new.with_name(new.name.replace("llmrun-new-", PREFIX))  # only locked folders get this name
        new.rename(path)
        return cls(path, lock)

    def remove(self) -> None:
        """Remove the folder and its contents, and release the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


def sweep_temp_dirs() -> None:
    """Remove the folders of killed owners."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # already removed, or owned by another user
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)

"""Unix sockets at paths of any length."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

BACKLOG = 128


def listen_at(path: Path) -> socket.socket:
    """Return a listening Unix socket, accessible to this user only. Removes stale sockets from its folder."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_stale(path.parent)
    listener = socket.socket(socket.AF_UNIX)
    with short_path(path) as name:
        listener.bind(name)
    path.chmod(0o600)
    listener.listen(BACKLOG)
    return listener


def is_listening(path: Path) -> bool:
    """Return whether a process listens on the socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection, short_path(path) as name:
        connection.settimeout(1)
        connection.connect(name)
        return True
    return False


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """Yield a name of at most 107 bytes for the path, the limit for Unix sockets. Raises OSError."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _remove_stale(folder: Path) -> None:
    """Remove the sockets on which no process listens."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as connection, short_path(path) as name:
            connection.settimeout(1)
            try:
                connection.connect(name)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # its owner is busy

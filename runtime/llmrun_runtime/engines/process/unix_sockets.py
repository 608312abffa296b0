"""Unix sockets at paths of any length."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

BACKLOG = 128


def listen_at(path: Path) -> socket.socket:
    """A listening Unix socket for this user alone; those beside it that nobody listens on any more are removed."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(path.parent)
    listener = socket.socket(socket.AF_UNIX)
    with short_name(path) as name:
        listener.bind(name)
    path.chmod(0o600)
    listener.listen(BACKLOG)
    return listener


def listens(warm: Path) -> bool:
    """Whether anybody listens at the socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as caller, short_name(warm) as name:
        caller.settimeout(1)
        caller.connect(name)
        return True
    return False


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name of at most 107 bytes, as Unix sockets need, for a path of any length. Raises OSError."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _sweep(folder: Path) -> None:
    """Remove the sockets that nobody listens on any more."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as caller, short_name(path) as name:
            caller.settimeout(1)
            try:
                caller.connect(name)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # somebody's, who is busy

"""Hands listening sockets to another process of this machine.

Both processes then accept from the same queue. Closing a socket instead would reset the connections that wait in it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from llmrun_runtime.engines.process.unix_sockets import listen_at, short_path

TIMEOUT_S = 5.0
MAX_SOCKETS = 253  # Linux's limit per message, SCM_MAX_FD


async def receive_sockets(path: Path, request: Callable[[], Awaitable[None]]) -> list[socket.socket]:
    """Listen at the Unix socket `path` while `request` has another process call `send_sockets`.

    Raises OSError, or what `request` raises.
    """
    with await asyncio.to_thread(listen_at, path) as listener:
        listener.settimeout(TIMEOUT_S)
        receiving = asyncio.ensure_future(asyncio.to_thread(_receive, listener))
        try:
            await request()
        finally:
            path.unlink(missing_ok=True)
            await asyncio.wait({receiving})  # its thread uses the listener for at most TIMEOUT_S
        return receiving.result()


def _receive(listener: socket.socket) -> list[socket.socket]:
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(TIMEOUT_S)
        _, descriptors, _, _ = socket.recv_fds(connection, 1, MAX_SOCKETS)
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]


def send_sockets(path: Path, sockets: list[socket.socket]) -> None:
    """Send the sockets to the process that listens at `path`. Raises OSError."""
    with socket.socket(socket.AF_UNIX) as connection, short_path(path) as name:
        connection.settimeout(TIMEOUT_S)
        connection.connect(name)
        socket.send_fds(connection, [b"."], [sock.fileno() for sock in sockets])

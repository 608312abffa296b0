"""Serve an ASGI app on a port, inside an actor's event loop."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from llmrun.errors import ClusterError
from llmrun_runtime.asgi import App

# Longer than the ingress keeps an idle connection to control open.
KEEP_ALIVE_S = 75
# For a connection on which nothing is sent.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S = 30, 10
# For a client that acknowledges nothing, or that does not read.
UNREAD_TIMEOUT_MS = 60_000
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def http_url(host: str, port: int) -> str:
    """Return the URL of a server, with an IPv6 address in brackets."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def bind(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Return a listening socket; port 0 lets the kernel choose. Raises ClusterError if the port is in use.

    `shared`: other processes of this user can listen on the same port; the kernel distributes connections among them.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    # Accepted connections inherit these: without them, a client that is gone would stay connected for ever.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_TIMEOUT_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ClusterError(
            f"cannot listen on {host}:{port}: {error.strerror}. Stop the process that uses the port, or choose "
            f"another one with --port"
        ) from error
    sock.listen(2048)
    return sock


async def serve(app: App, sock: socket.socket) -> None:
    """Serve until cancelled."""
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    server = uvicorn.Server(config)
    try:
        await server.serve(sockets=[sock])
    except asyncio.CancelledError:
        server.should_exit = server.force_exit = True
        if server.started:
            await server.shutdown(sockets=[sock])
        raise
    finally:
        sock.close()

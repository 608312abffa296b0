"""Serve an ASGI app on a port, inside an actor's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn

from llmrun.errors import ClusterError
from llmrun_runtime.asgi import App
from llmrun_runtime.http_protocol import LimitedProtocol
from llmrun_runtime.listening import Listening

# For idle connections to control: longer than the ingress keeps one.
KEEP_ALIVE_S = 75.0
# For a connection on which nothing is sent.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S = 30, 10
# For a client that acknowledges nothing, or that does not read.
UNREAD_TIMEOUT_MS = 60_000
POLL_S = 0.05
CERTIFICATE_CHECK_S = 10.0

log = logging.getLogger("llmrun.ingress")


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


class HTTPServer:
    """Serves an ASGI app on listening sockets until it is cancelled or drained."""

    def __init__(self, app: App, listening: Listening | None = None, keepalive_timeout: float = KEEP_ALIVE_S) -> None:
        """`listening`: has the certificate; None for plain HTTP. `keepalive_timeout`: of idle connections, seconds."""
        self._listening = listening
        self._config = uvicorn.Config(
            app,
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=keepalive_timeout,  # type: ignore[arg-type] # it is only added to a time
        )
        self._config.load()
        self._server = uvicorn.Server(self._config)

    async def serve(self, sockets: Sequence[socket.socket]) -> None:
        """Serve until cancelled; then close the sockets and all connections. Raises ClusterError."""
        server = self._server
        tls = self._config.ssl = self._listening.tls() if self._listening else None
        reloading = asyncio.ensure_future(self._reload_certificate(tls))
        try:
            await server.serve(sockets=list(sockets))
        except asyncio.CancelledError:
            server.should_exit = server.force_exit = True
            if server.started:
                await server.shutdown(sockets=list(sockets))
            raise
        finally:
            reloading.cancel()
            for sock in sockets:
                sock.close()

    async def _reload_certificate(self, tls: ssl.SSLContext | None) -> None:
        """Use a renewed certificate for new connections, within CERTIFICATE_CHECK_S. Never returns."""
        listening = self._listening
        if not tls or not listening:
            return
        files = [Path(file) for file in (listening.tls_cert, listening.tls_key) if file]
        seen = _changes(files)
        while True:
            await asyncio.sleep(CERTIFICATE_CHECK_S)
            if (now := _changes(files)) == seen:
                continue
            try:
                listening.load_certificate(tls)
                log.info("%s has been renewed", listening.tls_cert)
                seen = now
            except ClusterError as error:  # perhaps only one of the two files has been replaced yet
                log.warning("continuing with the earlier certificate: %s", error)

    @property
    def _connections(self) -> set[Any]:
        """The open connections: instances of uvicorn's HttpToolsProtocol."""
        connections: set[Any] = self._server.server_state.connections
        return connections

    def stop_accepting(self) -> None:
        """Leave new connections to the other processes that listen on the same sockets."""
        for listener in self._server.servers:
            listener.close()

    def end_keepalive(self) -> None:
        """From now on, each response that starts has `Connection: close`.

        A stream that runs keeps its connection for one more request: a client that cannot know of the close would send
        its next request into it.
        """
        state, header = self._server.server_state, (b"connection", b"close")
        self._config.encoded_headers.append(header)  # uvicorn copies these once per second
        state.default_headers = [*state.default_headers, header]
        for connection in self._connections:
            cycle = connection.cycle
            if cycle and not cycle.response_started:
                cycle.keep_alive = False

    async def idle(self, linger: float) -> None:
        """Return when no connection has a request; close each that has had none for `linger` seconds."""
        since: dict[Any, float] = {}
        while connections := set(self._connections):
            now = time.monotonic()
            unused = {each for each in connections if each.cycle is None or each.cycle.response_complete}
            since = {each: since.get(each, now) for each in unused}
            for connection in [each for each, began in since.items() if now - began >= linger]:
                connection.transport.close()
            await asyncio.sleep(POLL_S)

    async def flush(self) -> None:
        """Return when the operating system has the end of every complete response."""
        while any(
            each.cycle and each.cycle.response_complete and each.transport.get_write_buffer_size()
            for each in self._connections
        ):
            await asyncio.sleep(POLL_S)


def _changes(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Return what changes when a file is replaced."""
    found = []
    for file in files:
        with contextlib.suppress(OSError):
            stat = file.stat()
            found.append((stat.st_ino, stat.st_mtime_ns))
    return found


async def serve(app: App, sock: socket.socket) -> None:
    """Serve until cancelled."""
    await HTTPServer(app).serve([sock])

"""The ingress's end of links: one connection to each engine, shared by all requests."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Self

from llmrun_runtime.link.frames import BODY, CANCEL, END, FAILED, HEADERS, PAUSE, RESUME, Link, new_socket

# Bytes of a response that are buffered for a slow client before the engine is paused.
HIGH_WATER_BYTES = 2**18


class LinkLostError(ConnectionError):
    """The connection to the engine closed, or the engine's app failed, before the end of the response."""


class Exchange:
    """One request and its response; a context manager that cancels the request if it exits before the end."""

    def __init__(self, link: LinkClient, number: int) -> None:
        self._link = link
        self._number = number
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._paused = False
        self._ended = False
        self._failure = ""
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    async def send_body(self, body: bytes) -> None:
        """Send the complete body of the request."""
        await self._link.send_body(self._number, body)
        self._link.send_frame(self._number, END)

    async def wait_headers(self) -> None:
        """Wait for `status` and `headers`. Raises LinkLostError."""
        while not self.status:
            await self._wait()

    async def read(self) -> bytes:
        """Return what was received since the last read, at least one byte; b"" at the end. Raises LinkLostError."""
        while not self._chunks and not self._ended:
            await self._wait()
        chunks, self._chunks, self._buffered = self._chunks, [], 0
        if self._paused:
            self._paused = False
            self._link.send_frame(self._number, RESUME)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _wait(self) -> None:
        if self._failure:
            raise LinkLostError(self._failure)
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def on_frame(self, kind: int, payload: bytes) -> None:
        """Handle a received frame. Raises ValueError if it is malformed."""
        if kind == BODY:
            self._chunks.append(payload)
            self._buffered += len(payload)
            if self._buffered > HIGH_WATER_BYTES and not self._paused:
                self._paused = True
                self._link.send_frame(self._number, PAUSE)
        elif kind == HEADERS:
            self.status, headers = json.loads(payload)
            self.headers = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers]
        elif kind == END:
            self._ended = True
        elif kind == FAILED:
            self._failure = "the engine's app failed"
        self._wake()

    def on_close(self) -> None:
        """Handle the end of the connection."""
        self._failure = "the connection to the engine was closed"
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.forget(self._number, cancel=not self._ended and not self._failure)


class LinkClient(Link):
    """A connection to one engine."""

    def __init__(self) -> None:
        super().__init__()
        self._exchanges: dict[int, Exchange] = {}
        self._number = 0

    def request(self, method: str, path: str, query: bytes, headers: list[tuple[str, str]]) -> Exchange:
        """Start a request; send its body next. Raises ValueError if the headers are too large."""
        self._number = number = (self._number + 1) % 2**32
        head = {"method": method, "path": path, "query": query.decode("latin-1"), "headers": headers}
        self.send_headers(number, head)
        exchange = self._exchanges[number] = Exchange(self, number)
        return exchange

    def forget(self, number: int, *, cancel: bool) -> None:
        """Drop an exchange, and optionally tell the engine to cancel it."""
        del self._exchanges[number]
        if cancel:
            self.send_frame(number, CANCEL)

    def on_frame(self, number: int, kind: int, payload: bytes) -> None:
        """See `Link`."""
        if exchange := self._exchanges.get(number):  # otherwise it was cancelled
            exchange.on_frame(kind, payload)

    def on_close(self) -> None:
        """See `Link`."""
        for exchange in self._exchanges.values():
            exchange.on_close()


class Links:
    """Connections to engines, one to each, opened on first use."""

    def __init__(self, connect_timeout: float) -> None:
        self._timeout = connect_timeout or None
        self._links: dict[tuple[str, int], asyncio.Task[LinkClient]] = {}

    async def get(self, host: str, port: int) -> LinkClient:
        """Return the connection to an engine. Raises OSError if it cannot connect, TimeoutError if not in time."""
        task = self._links.get((host, port))
        if task is None or _closed(task):
            self._links = {key: task for key, task in self._links.items() if not _closed(task)}
            task = asyncio.get_running_loop().create_task(_connect(host, port, self._timeout))
            self._links[host, port] = task
        return await asyncio.shield(task)

    def close(self) -> None:
        """Close all connections."""
        for task in self._links.values():
            if task.done() and not _closed(task):
                task.result().close()
            task.cancel()


def _closed(task: asyncio.Task[LinkClient]) -> bool:
    """Whether the connection was lost or could not be opened."""
    return task.done() and (task.cancelled() or task.exception() is not None or not task.result().open)


async def _connect(host: str, port: int, timeout: float | None) -> LinkClient:
    loop = asyncio.get_running_loop()
    sock = new_socket(host)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(timeout):
            await loop.sock_connect(sock, (host, port))
            _, client = await loop.create_connection(LinkClient, sock=sock)
    except BaseException:
        sock.close()
        raise
    return client

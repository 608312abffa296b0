"""The ingress's end of links: asks engines, many requests on one connection to each."""

from __future__ import annotations

import asyncio
import json
from types import TracebackType
from typing import Self

from llmrun_runtime.link.frames import BODY, BROKEN, END, GONE, OPEN, PAUSE, RESUME, Link, new_socket

# So much of an answer is kept for a caller who reads slower than the engine writes.
HIGH = 2**18


class LinkLostError(ConnectionError):
    """The engine is gone, or its app failed, before the end of the answer."""


class Answer:
    """What an engine says to one request; a context that tells the engine if it is left before the end."""

    def __init__(self, link: LinkClient, number: int) -> None:
        self._link = link
        self._number = number
        self._pieces: list[bytes] = []
        self._size = 0
        self._paused = False
        self._ended = False
        self._lost = ""
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    async def started(self) -> None:
        """Wait for status and headers. Raises LinkLostError."""
        while not self.status:
            await self._more()

    async def read(self) -> bytes:
        """What has come since the last read, at least a byte; b"" at the end. Raises LinkLostError."""
        while not self._pieces and not self._ended:
            await self._more()
        pieces, self._pieces, self._size = self._pieces, [], 0
        if self._paused:
            self._paused = False
            self._link.say(self._number, RESUME)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _more(self) -> None:
        if self._lost:
            raise LinkLostError(self._lost)
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    def heard(self, kind: int, payload: bytes) -> None:
        """A frame for it has come. Raises ValueError if it makes no sense."""
        if kind == BODY:
            self._pieces.append(payload)
            self._size += len(payload)
            if self._size > HIGH and not self._paused:
                self._paused = True
                self._link.say(self._number, PAUSE)
        elif kind == OPEN:
            self.status, headers = json.loads(payload)
            self.headers = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers]
        elif kind == END:
            self._ended = True
        elif kind == BROKEN:
            self._lost = "the engine's app failed"
        self._wake()

    def lose(self) -> None:
        """The connection is over."""
        self._lost = "the connection to the engine was closed"
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.leave(self._number, tell=not self._ended and not self._lost)


class LinkClient(Link):
    """A connection to one engine."""

    def __init__(self) -> None:
        super().__init__()
        self._answers: dict[int, Answer] = {}
        self._number = 0

    def ask(self, method: str, path: str, query: bytes, headers: list[tuple[str, str]]) -> Answer:
        """Begin a request; its body is said with `finish`."""
        self._number = number = (self._number + 1) % 2**32
        answer = self._answers[number] = Answer(self, number)
        self.say_json(
            number, OPEN, {"method": method, "path": path, "query": query.decode("latin-1"), "headers": headers}
        )
        return answer

    async def finish(self, answer: Answer, body: bytes) -> None:
        """Send a request's whole body."""
        number = answer._number
        await self.say_body(number, body)
        self.say(number, END)

    def leave(self, number: int, *, tell: bool) -> None:
        """Nobody waits for that answer any more."""
        del self._answers[number]
        if tell:
            self.say(number, GONE)

    def heard(self, number: int, kind: int, payload: bytes) -> None:
        """See `Link`."""
        if answer := self._answers.get(number):  # else its caller has left
            answer.heard(kind, payload)

    def lost(self) -> None:
        """See `Link`."""
        for answer in self._answers.values():
            answer.lose()


class Links:
    """Connections to engines, one to each, made when first needed."""

    def __init__(self, connect_timeout: float) -> None:
        self._timeout = connect_timeout or None
        self._links: dict[tuple[str, int], asyncio.Task[LinkClient]] = {}

    async def get(self, host: str, port: int) -> LinkClient:
        """The connection to the engine there. Raises OSError if none can be had, TimeoutError if not in time."""
        task = self._links.get((host, port))
        if task is None or _over(task):
            self._links = {key: task for key, task in self._links.items() if not _over(task)}
            task = asyncio.get_running_loop().create_task(_connect(host, port, self._timeout))
            self._links[host, port] = task
        return await asyncio.shield(task)

    def close(self) -> None:
        """End all of them."""
        for task in self._links.values():
            if task.done() and not _over(task):
                task.result().close()
            task.cancel()


def _over(task: asyncio.Task[LinkClient]) -> bool:
    """Whether that connection was lost, or never made."""
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

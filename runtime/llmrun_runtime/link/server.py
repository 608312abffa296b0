"""The engine's end of links: an ASGI server beside the engine's own, for ingresses alone. Standard library only."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

from llmrun_runtime.asgi import App, Message, Scope, answer_error
from llmrun_runtime.link.frames import BODY, BROKEN, END, GONE, OPEN, PAUSE, RESUME, Link, new_socket

log = logging.getLogger("llmrun.link")


async def listen(app: App, host: str, state: dict[str, Any] | None = None) -> asyncio.Server:
    """Serve `app` to whoever connects, on a port of the kernel's choice; `state` is its lifespan's.

    Asks for no token: the shim, which is in the app, does.
    """
    sock = new_socket(host)
    sock.bind((host, 0))
    return await asyncio.get_running_loop().create_server(lambda: Server(app, state or {}), sock=sock, backlog=1024)


class _Exchange:
    """One request and its answer, as the app sees them."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.whole = False
        """Whether all of the body has come."""
        self.over = False
        """Whether nobody listens any more: the caller left, or has its answer."""
        self.changed = asyncio.Event()
        self.flows = asyncio.Event()
        self.flows.set()
        self._given = False

    async def receive(self) -> Message:
        """See ASGI."""
        while not (self.pieces or self.over or (self.whole and not self._given)):
            self.changed.clear()
            await self.changed.wait()
        if self.over:
            return {"type": "http.disconnect"}
        body, self.pieces, self._given = b"".join(self.pieces), [], self.whole
        return {"type": "http.request", "body": body, "more_body": not self.whole}

    def end(self) -> None:
        """Nobody listens any more."""
        self.over = True
        self.changed.set()
        self.flows.set()


class Server(Link):
    """One ingress's connection."""

    def __init__(self, app: App, state: dict[str, Any]) -> None:
        super().__init__()
        self._app = app
        self._state = state
        self._exchanges: dict[int, _Exchange] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def heard(self, number: int, kind: int, payload: bytes) -> None:
        """See `Link`."""
        if kind == OPEN:
            scope = self._scope(json.loads(payload))
            exchange = self._exchanges[number] = _Exchange()
            task = self._loop.create_task(self._answer(number, exchange, scope))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif found := self._exchanges.get(number):  # else it has been answered already
            if kind == BODY:
                found.pieces.append(payload)
                found.changed.set()
            elif kind == END:
                found.whole = True
                found.changed.set()
            elif kind == GONE:
                found.end()
            elif kind == PAUSE:
                found.flows.clear()
            elif kind == RESUME:
                found.flows.set()

    def lost(self) -> None:
        """See `Link`."""
        for exchange in self._exchanges.values():
            exchange.end()

    def _scope(self, head: dict[str, Any]) -> Scope:
        """Raises ValueError if `head` is none."""
        try:
            path, query, headers = head["path"], head["query"], head["headers"]
            assert self._transport
            return {
                "type": "http",
                # As uvicorn has it. By 2.4 Starlette would hear of a caller's leaving at the next token only.
                "asgi": {"version": "3.0", "spec_version": "2.3"},
                "http_version": "1.1",
                "method": head["method"],
                "scheme": "http",
                "path": path,
                "raw_path": path.encode(),
                "query_string": query.encode("latin-1"),
                "root_path": "",
                "headers": [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers],
                "client": self._transport.get_extra_info("peername")[:2],
                "server": self._transport.get_extra_info("sockname")[:2],
                "state": dict(self._state),
            }
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no head of a request: {error}") from None

    async def _answer(self, number: int, exchange: _Exchange, scope: Scope) -> None:
        started = ended = False

        async def send(message: Message) -> None:
            nonlocal started, ended
            if exchange.over:
                return
            if message["type"] == "http.response.start":
                headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in message["headers"]]
                self.say_json(number, OPEN, [message["status"], headers])
                started = True
            elif message["type"] == "http.response.body":
                if body := message.get("body"):
                    await self.say_body(number, body)
                if not message.get("more_body"):
                    ended = True
                    self.say(number, END)
                    exchange.end()
                elif not exchange.flows.is_set():
                    await exchange.flows.wait()

        try:
            await self._app(scope, exchange.receive, send)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
        finally:
            del self._exchanges[number]
            if not started:
                await answer_error(
                    send, 500, "the engine failed: `llmrun logs` says why", "internal_error", "engine_failed"
                )
            elif not ended and not exchange.over:
                self.say(number, BROKEN)
            exchange.end()

"""The engine's end of links: an ASGI server for ingresses, next to the engine's own. Standard library only."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from typing import Any

from llmrun_runtime.asgi import App, Message, Scope, send_error
from llmrun_runtime.link.frames import BODY, CANCEL, END, FAILED, HEADERS, PAUSE, RESUME, Link, new_socket

TOKEN_TIMEOUT_S = 10.0
log = logging.getLogger("llmrun.link")


async def listen(
    app: App, host: str, state: dict[str, Any] | None = None, *, credential: tuple[bytes, bytes]
) -> asyncio.Server:
    """Serve `app` on a port that the kernel chooses; `state` is the app's lifespan state.

    A connection without a request that has this `credential`, a header, is closed after TOKEN_TIMEOUT_S. Until then, no
    bodies are held for it. The shim inside the app refuses its requests.
    """
    sock = new_socket(host)
    sock.bind((host, 0))
    return await asyncio.get_running_loop().create_server(
        lambda: Server(app, state or {}, credential), sock=sock, backlog=1024
    )


class _Exchange:
    """One request and its response, as the app sees them.

    States, in order; `closed` can follow any of them and is final:

    1. receiving: neither `body_complete` nor `closed`; `receive` waits for chunks.
    2. responding: `body_complete`; `receive` returns the last chunk once, then waits for `closed`.
    3. closed: the response ended, the client left or the connection closed. `receive` returns http.disconnect at once,
       even if chunks are left, and what the app still sends is discarded.

    `changed` is set by each new chunk and each transition, so that `receive` looks again. `flowing` does not depend on
    the state: PAUSE clears it, RESUME and `close` set it, so that no `send` waits for a client that has left.
    """

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.body_complete = False
        self.closed = False
        self.changed = asyncio.Event()
        self.flowing = asyncio.Event()
        self.flowing.set()
        self._body_returned = False

    async def receive(self) -> Message:
        """See ASGI."""
        while not (self.chunks or self.closed or (self.body_complete and not self._body_returned)):
            self.changed.clear()
            await self.changed.wait()
        if self.closed:
            return {"type": "http.disconnect"}
        body, self.chunks, self._body_returned = b"".join(self.chunks), [], self.body_complete
        return {"type": "http.request", "body": body, "more_body": not self.body_complete}

    def close(self) -> None:
        """Enter the final state."""
        self.closed = True
        self.changed.set()
        self.flowing.set()


class Server(Link):
    """One ingress's connection."""

    def __init__(self, app: App, state: dict[str, Any], credential: tuple[bytes, bytes]) -> None:
        super().__init__()
        self._credential = credential
        self._unknown: asyncio.TimerHandle | None = None
        """Closes the connection; None once a request had the credential."""
        self._app = app
        self._state = state
        self._exchanges: dict[int, _Exchange] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._unknown = self._loop.call_later(TOKEN_TIMEOUT_S, self.close)

    def on_frame(self, number: int, kind: int, payload: bytes) -> None:
        """See `Link`."""
        if kind == HEADERS:
            scope = self._scope(json.loads(payload))
            self._check_credential(scope)
            exchange = self._exchanges[number] = _Exchange()
            task = self._loop.create_task(self._run(number, exchange, scope))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif current := self._exchanges.get(number):  # otherwise its response has ended
            if kind == BODY and not self._unknown:
                current.chunks.append(payload)
                current.changed.set()
            elif kind == END:
                current.body_complete = True
                current.changed.set()
            elif kind == CANCEL:
                current.close()
            elif kind == PAUSE:
                current.flowing.clear()
            elif kind == RESUME:
                current.flowing.set()

    def _check_credential(self, scope: Scope) -> None:
        name, value = self._credential
        if self._unknown and hmac.compare_digest(dict(scope["headers"]).get(name, b""), value):
            self._unknown.cancel()
            self._unknown = None

    def on_close(self) -> None:
        """See `Link`."""
        if self._unknown:
            self._unknown.cancel()
        for exchange in self._exchanges.values():
            exchange.close()

    def _scope(self, head: dict[str, Any]) -> Scope:
        """Return the ASGI scope of a request. Raises ValueError if `head` is malformed."""
        try:
            path, query, headers = head["path"], head["query"], head["headers"]
            assert self._transport
            return {
                "type": "http",
                # Like uvicorn. With 2.4, Starlette would notice a client's disconnect only at the next token.
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
            raise ValueError(f"invalid request head: {error}") from None

    async def _run(self, number: int, exchange: _Exchange, scope: Scope) -> None:
        started = ended = False

        async def send(message: Message) -> None:
            nonlocal started, ended
            if exchange.closed:
                return
            if message["type"] == "http.response.start":
                headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in message["headers"]]
                self.send_headers(number, [message["status"], headers])
                started = True
            elif message["type"] == "http.response.body":
                if body := message.get("body"):
                    await self.send_body(number, body)
                if not message.get("more_body"):
                    ended = True
                    self.send_frame(number, END)
                    exchange.close()
                elif not exchange.flowing.is_set():
                    await exchange.flowing.wait()

        try:
            await self._app(scope, exchange.receive, send)
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
        finally:
            del self._exchanges[number]
            if not started:
                message = "the engine failed. See `llmrun logs`"
                await send_error(send, 500, message, "internal_error", "engine_failed")
            elif not ended and not exchange.closed:
                self.send_frame(number, FAILED)
            exchange.close()

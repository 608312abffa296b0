"""The answer of a streaming caller who waits long: 200 and comments first, so that no proxy between gives up.

Then come the engine's events as they are, or, if it all ends badly, one event with the error.
"""

from __future__ import annotations

import json

from llmrun_runtime.asgi import Headers, Message, Send, error_body
from llmrun_runtime.ingress.errors import HTTPError

# What is known by then gets its real status.
QUIET_S = 10.0
EVERY_S = 5.0


class KeepaliveStream:
    """A `Send` around the caller's; until the first comment it changes nothing."""

    def __init__(self, send: Send, headers: Headers) -> None:
        self._send = send
        self._headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        self._headers += headers
        self.opened = False
        self.started = False
        """Whether the caller has heard a status."""
        self.events = False
        """Whether it is a stream of events, which can end with one that says what went wrong."""
        self._refused: bytearray | None = None

    @property
    def streams(self) -> bool:
        """Whether it is a stream of events of an answer, not of an engine's refusal."""
        return self.events and self._refused is None

    async def comment(self, text: str) -> None:
        """Say something that clients do not show."""
        if not self.opened:
            self.opened = self.started = self.events = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await self._send({"type": "http.response.body", "body": f": {text}\n\n".encode(), "more_body": True})

    async def refuse(self, refusal: HTTPError) -> None:
        """End with an error event."""
        body = refusal.body()
        await self._end(json.dumps(body, ensure_ascii=False).encode())

    async def __call__(self, message: Message) -> None:
        """Pass on what an engine answers."""
        if not self.opened:
            if message["type"] == "http.response.start":
                self.started = True
                kinds = [value for key, value in message["headers"] if key.lower() == b"content-type"]
                self.events = any(kind.lower().startswith(b"text/event-stream") for kind in kinds)
            await self._send(message)
        elif message["type"] == "http.response.start":
            if message["status"] != 200:
                self._refused = bytearray()
        elif self._refused is None:
            await self._send(message)
        else:
            self._refused += message.get("body", b"")
            if not message.get("more_body"):
                await self._end(_one_line(bytes(self._refused)))

    async def _end(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": b"data: " + data + b"\n\n"})


def _one_line(body: bytes) -> bytes:
    """An engine's answer to a request that it refuses, as the data of an event."""
    try:
        found = json.loads(body)
    except ValueError:
        found = error_body(body.decode(errors="replace")[:1000], "invalid_request_error", "engine_refused")
    return json.dumps(found, ensure_ascii=False).encode()

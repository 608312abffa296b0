"""Keepalive for streaming requests that wait long: a 200 and comments, so that no proxy in between times out.

The engine's events follow unchanged; if the request fails, one event with the error follows instead.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from llmrun_runtime.asgi import Headers, Message, Send, error_body
from llmrun_runtime.ingress.errors import HTTPError


@dataclass(frozen=True)
class KeepaliveTiming:
    """Seconds before the first comment, and between comments. Errors before the first one keep their own status."""

    first: float = 10.0
    interval: float = 5.0


DEFAULT_TIMING = KeepaliveTiming()
# A client that reads so little that one chunk does not fit into the buffers would keep its engine busy for ever.
WRITE_TIMEOUT_S = 60.0


class KeepaliveStream:
    """A `Send` around the client's; it changes nothing until the first comment is sent.

    Raises ConnectionAbortedError if the client reads too little for WRITE_TIMEOUT_S.
    """

    def __init__(self, send: Send, headers: Headers, timing: KeepaliveTiming) -> None:
        self.timing = timing
        self.response_started = False
        """Whether the client has received a status."""
        self.is_event_stream = False
        """Whether the response is an event stream, so that an error can be sent as its last event."""
        self._client_send = send
        self._headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        self._headers += headers
        self._comment_sent = False
        self._error_body: bytearray | None = None
        self._in_event = False
        """Whether the last event is incomplete."""

    @property
    def streams_answer(self) -> bool:
        """Whether the response is an event stream with an answer, not with an engine's error."""
        return self.is_event_stream and self._error_body is None

    async def comment(self, text: str) -> None:
        """Send a comment, which clients ignore."""
        if not self._comment_sent:
            self._comment_sent = self.response_started = self.is_event_stream = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await self._send({"type": "http.response.body", "body": f": {text}\n\n".encode(), "more_body": True})

    async def fail(self, error: HTTPError) -> None:
        """End the stream with an error event."""
        await self._end(json.dumps(error.body(), ensure_ascii=False).encode())

    async def __call__(self, message: Message) -> None:
        """Forward a message of the engine's response."""
        if not self._comment_sent:
            if message["type"] == "http.response.start":
                self.response_started = True
                types = [value for key, value in message["headers"] if key.lower() == b"content-type"]
                self.is_event_stream = any(each.lower().startswith(b"text/event-stream") for each in types)
            await self._send(message)
        elif message["type"] == "http.response.start":
            if message["status"] != 200:
                self._error_body = bytearray()
        elif self._error_body is None:
            await self._send(message)
        else:
            self._error_body += message.get("body", b"")
            if not message.get("more_body"):
                await self._end(_one_line(bytes(self._error_body)))

    async def _send(self, message: Message) -> None:
        if body := message.get("body"):
            self._in_event = not body.endswith(b"\n\n")
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._client_send(message)
        except TimeoutError:
            raise ConnectionAbortedError(f"the client read too little for {WRITE_TIMEOUT_S:g} s") from None

    async def _end(self, data: bytes) -> None:
        event = b"data: " + data + b"\n\n"
        await self._send({"type": "http.response.body", "body": b"\n\n" + event if self._in_event else event})


def _one_line(body: bytes) -> bytes:
    """Return an engine's error response as the data of one event."""
    try:
        error = json.loads(body)
    except ValueError:
        error = error_body(body.decode(errors="replace")[:1000], "invalid_request_error", "engine_refused")
    return json.dumps(error, ensure_ascii=False).encode()

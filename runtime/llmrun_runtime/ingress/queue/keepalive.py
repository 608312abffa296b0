"""Keepalive for streaming requests that wait long: a 200 and comments, so that no proxy in between times out.

The engine's events follow unchanged; if the request fails, one event with the error follows instead.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from llmrun_runtime.asgi import Headers, Message, Send
from llmrun_runtime.ingress.error_shapes import ErrorShape
from llmrun_runtime.ingress.errors import HTTPError


@dataclass(frozen=True)
class KeepaliveTiming:
    """Seconds before the first comment, and between comments. Errors before the first one keep their own status."""

    first: float = 10.0
    interval: float = 5.0


DEFAULT_TIMING = KeepaliveTiming()
# A client that reads so little that one chunk does not fit into the buffers would keep its engine busy for ever.
WRITE_TIMEOUT_S = 60.0
# Of every event stream: proxies must neither keep it nor wait for its end (nginx reads `x-accel-buffering`).
STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class KeepaliveStream:
    """A `Send` around the client's; it only adds STREAM_HEADERS to event streams until the first comment is sent.

    Raises ConnectionAbortedError if the client reads too little for WRITE_TIMEOUT_S.
    """

    def __init__(self, send: Send, headers: Headers, timing: KeepaliveTiming, shape: ErrorShape) -> None:
        self.timing = timing
        self.response_started = False
        """Whether the client has received a status."""
        self.is_event_stream = False
        """Whether the response is an event stream, so that an error can be sent as its last event."""
        self._client_send = send
        self._headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *STREAM_HEADERS, *headers]
        self._shape = shape
        self._comment_sent = False
        self._first = self._last = b""
        """The engine's first and its last chunk."""

    async def comment(self, text: str) -> None:
        """Send a comment, which clients ignore."""
        if not self._comment_sent:
            self._comment_sent = self.response_started = self.is_event_stream = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await self._send({"type": "http.response.body", "body": f": {text}\n\n".encode(), "more_body": True})

    async def fail(self, error: HTTPError) -> None:
        """End the stream with an error event."""
        event = self._shape.event(error, self._first, self._last)
        await self._send({"type": "http.response.body", "body": event})

    async def __call__(self, message: Message) -> None:
        """Forward a message of the engine's response."""
        if message["type"] == "http.response.body":
            if chunk := message.get("body"):
                self._first, self._last = self._first or chunk, chunk
            await self._send(message)
        elif not self._comment_sent:
            self.response_started = True
            headers = [(key.lower(), value) for key, value in message["headers"]]
            self.is_event_stream = dict(headers).get(b"content-type", b"").lower().startswith(b"text/event-stream")
            if self.is_event_stream:
                own = dict(STREAM_HEADERS)
                headers = [*((key, value) for key, value in headers if key not in own), *STREAM_HEADERS]
            await self._send({**message, "headers": headers})

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._client_send(message)
        except TimeoutError:
            raise ConnectionAbortedError(f"the client read too little for {WRITE_TIMEOUT_S:g} s") from None

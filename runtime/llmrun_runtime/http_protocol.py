"""uvicorn's HTTP protocol, with limits for what costs before a key is checked, and readable early refusals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import weakref
from itertools import islice
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from llmrun_runtime.asgi import error_body

HEADERS_TIMEOUT_S = 30.0
MAX_HEADERS = 200
# Of a request's target and headers. httptools joins the pieces of a header in quadratic time.
MAX_HEADER_BYTES = 64 * 2**10
# An open connection takes some 10 KiB.
MAX_CONNECTIONS = 10_000
# How many connections are looked at to find an idle one.
SEARCHED = 256
# After a response that did not wait for the rest of its request.
LINGER_S = 2.0


class LimitedProtocol(HttpToolsProtocol):
    """Limits the time, the size and the number of request headers, and the number of connections.

    1. A connection whose request headers are not complete after `headers_timeout` seconds is closed. The time runs from
       the connection's start, and later from the first byte that arrives after a response. Connections that idle
       between requests are uvicorn's matter.
    2. Headers of more than MAX_HEADER_BYTES, or more than MAX_HEADERS, get a 431.
    3. Beyond `max_connections`, a new connection takes the place of one that has no request.
    """

    headers_timeout = HEADERS_TIMEOUT_S
    linger = LINGER_S
    max_connections = MAX_CONNECTIONS
    _deadline: asyncio.TimerHandle | None = None
    _lingering = False
    _in_headers = False
    _header_bytes = 0
    """Of the request whose headers arrive: those that httptools has parsed."""
    _unparsed_bytes = 0
    """Those that have arrived since httptools last parsed one."""
    _too_large = False
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(_LingeringTransport(transport, self))  # type: ignore[arg-type]
        self._start_deadline()
        if len(self.connections) > self.max_connections:
            others: Any = (each for each in islice(self.connections, SEARCHED) if each is not self)
            idle = (each for each in others if each.cycle is None or each.cycle.response_complete)
            next(idle, self).transport.close()

    def data_received(self, data: bytes) -> None:
        """Start a deadline unless these bytes belong to a request that is being answered.

        They can be the rest of a body after an early refusal, too: uvicorn stops its own timer at every byte.
        """
        if self._lingering:
            return
        in_headers = self._in_headers
        super().data_received(data)
        if in_headers and self._in_headers and not self._too_large:
            self._unparsed_bytes += len(data)
            if self._header_bytes + self._unparsed_bytes > MAX_HEADER_BYTES:
                self._too_large = True
                self.send_400_response("")
        if self.cycle and self.cycle.response_complete and not self._deadline:
            self._start_deadline()

    def on_message_begin(self) -> None:
        """Count the headers of a new request."""
        self._in_headers, self._header_bytes, self._unparsed_bytes = True, 0, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Count the target. Raises ValueError, which ends the parsing."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or one of the trailer. Raises ValueError, which ends the parsing."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._header_bytes, self._unparsed_bytes = self._header_bytes + size, 0
        if self._header_bytes > MAX_HEADER_BYTES or (self.headers and len(self.headers) >= MAX_HEADERS):
            self._too_large = True
            raise ValueError("headers too large")

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be parsed, or whose headers are too large, and close the connection."""
        if self.transport.is_closing():
            return
        if self.cycle and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.close()  # the refusal would become a part of the response that is being sent
            return
        if self._too_large:
            status = b"431 Request Header Fields Too Large"
            text = f"request headers are larger than {MAX_HEADER_BYTES // 1024} KiB, or more than {MAX_HEADERS}"
            body = error_body(text, "invalid_request_error", "headers_too_large")
        else:
            status = b"400 Bad Request"
            body = error_body("not a valid HTTP request", "invalid_request_error", "invalid_http")
        content = json.dumps(body).encode()
        length = str(len(content)).encode()
        headers = b"content-type: application/json\r\ncontent-length: " + length + b"\r\nconnection: close\r\n\r\n"
        self.transport.write(b"HTTP/1.1 " + status + b"\r\n" + headers + content)
        self._refused = True
        self.transport.close()

    def on_headers_complete(self) -> None:
        """End the deadline."""
        self._end_deadline()
        self._in_headers = False
        super().on_headers_complete()
        if self.cycle and self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UnchunkedCycle  # its task has not started yet

    def connection_lost(self, exc: Exception | None) -> None:
        """End the deadline."""
        self._end_deadline()
        super().connection_lost(exc)

    def close(self, transport: asyncio.Transport) -> None:
        """Close the connection; a client that is still sending its request gets time to read the response.

        The kernel answers bytes that arrive after a close with a reset, and the client's kernel then discards the
        response before the client has read it.
        """
        if self._lingering:
            return
        uploading = self._refused or (self.cycle and self.cycle.response_complete and self.cycle.more_body)
        if transport.is_closing() or not uploading or not transport.can_write_eof():
            transport.close()
            return
        self._lingering = True
        self.loop.call_later(self.linger, transport.close)
        transport.resume_reading()  # uvicorn may have paused it
        with contextlib.suppress(OSError):  # the client has just reset the connection
            transport.write_eof()

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.headers_timeout, self.transport.close)

    def _end_deadline(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None


class _UnchunkedCycle(RequestResponseCycle):
    """The response to a client of HTTP/1.0, which knows no chunks: the end of the connection ends the body.

    uvicorn would send chunks, which such a client takes for the body. nginx asks so unless it is told otherwise.
    """

    async def send(self, message: Any) -> None:
        """Send a message; without a Content-Length, expect just the bytes that come."""
        if not self.response_started:
            names = {name.lower() for name, _ in message.get("headers", ())}
            if b"content-length" not in names:
                self.chunked_encoding = False
                self._unbounded = True
        elif self._unbounded and self.scope["method"] != "HEAD":
            self.expected_content_length += len(message.get("body", b""))
        await super().send(message)

    async def run_asgi(self, app: Any) -> None:
        """Run the app; reset the connection if it fails: its end would end the body as if that were whole."""
        await super().run_asgi(app)
        if self._unbounded and self.response_started and not self.response_complete:
            self.transport.abort()

    _unbounded = False


class _LingeringTransport:
    """The connection's transport, whose `close` is the protocol's.

    The protocol refers to it, so it must not refer to the protocol: with a cycle, closed connections and what they
    received would stay in memory until a garbage collection.
    """

    def __init__(self, transport: asyncio.Transport, protocol: LimitedProtocol) -> None:
        self._transport = transport
        self._protocol = weakref.ref(protocol)

    def close(self) -> None:
        if protocol := self._protocol():
            protocol.close(self._transport)
        else:
            self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

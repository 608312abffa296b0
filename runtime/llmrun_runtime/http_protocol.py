"""uvicorn's HTTP protocol, with a deadline for request headers and readable early refusals."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_TIMEOUT_S = 30.0
# After a response that did not wait for the rest of its request.
LINGER_S = 2.0


class HeaderDeadlineProtocol(HttpToolsProtocol):
    """Closes a connection whose request headers are not complete after `headers_timeout` seconds.

    The time runs from the connection's start, and later from the first byte that arrives after a response. Connections
    that idle between requests are uvicorn's matter.
    """

    headers_timeout = HEADERS_TIMEOUT_S
    linger = LINGER_S
    _deadline: asyncio.TimerHandle | None = None
    _lingering = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(_LingeringTransport(transport, self))  # type: ignore[arg-type]
        self._start_deadline()

    def data_received(self, data: bytes) -> None:
        """Start a deadline unless these bytes belong to a request that is being answered.

        They can be the rest of a body after an early refusal, too: uvicorn stops its own timer at every byte.
        """
        if self._lingering:
            return
        super().data_received(data)
        if self.cycle and self.cycle.response_complete and not self._deadline:
            self._start_deadline()

    def on_headers_complete(self) -> None:
        """End the deadline."""
        self._end_deadline()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the deadline."""
        self._end_deadline()
        super().connection_lost(exc)

    def close(self, transport: asyncio.Transport) -> None:
        """Close the connection; a client that is still sending its request's body gets time to read the response.

        The kernel answers bytes that arrive after a close with a reset, and the client's kernel then discards the
        response before the client has read it.
        """
        if self._lingering:
            return
        uploading = self.cycle and self.cycle.response_complete and self.cycle.more_body
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


class _LingeringTransport:
    """The connection's transport, whose `close` is the protocol's.

    The protocol refers to it, so it must not refer to the protocol: with a cycle, closed connections and what they
    received would stay in memory until a garbage collection.
    """

    def __init__(self, transport: asyncio.Transport, protocol: HeaderDeadlineProtocol) -> None:
        self._transport = transport
        self._protocol = weakref.ref(protocol)

    def close(self) -> None:
        if protocol := self._protocol():
            protocol.close(self._transport)
        else:
            self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

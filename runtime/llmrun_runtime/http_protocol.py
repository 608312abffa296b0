"""uvicorn's HTTP protocol, with a deadline for request headers."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_TIMEOUT_S = 30.0


class HeaderDeadlineProtocol(HttpToolsProtocol):
    """Closes a connection whose request headers are not complete after `headers_timeout` seconds.

    The time runs from the connection's start, and later from the first byte that arrives after a response. Connections
    that idle between requests are uvicorn's matter.
    """

    headers_timeout = HEADERS_TIMEOUT_S
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request."""
        super().connection_made(transport)
        self._start_deadline()

    def data_received(self, data: bytes) -> None:
        """Start a deadline unless these bytes belong to a request that is being answered.

        They can be the rest of a body after an early refusal, too: uvicorn stops its own timer at every byte.
        """
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

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.headers_timeout, self.transport.close)

    def _end_deadline(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

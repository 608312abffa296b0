"""Ends an ingress in order: what is in flight completes, and no client loses a request without an answer."""

from __future__ import annotations

import asyncio

from llmrun_runtime.http import HTTPServer
from llmrun_runtime.ingress.app import Ingress
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.ingress.readiness import Readiness

POLL_S = 0.05
# Until then a client may send its next request on a connection that it keeps open.
LINGER_S = 3.0


class Drain:
    """The two ways to end an ingress. Timeouts are in seconds."""

    def __init__(self, queue: RequestQueue, ingress: Ingress, server: HTTPServer, readiness: Readiness) -> None:
        self._queue = queue
        self._ingress = ingress
        self._server = server
        self._readiness = readiness

    @property
    def remaining(self) -> int:
        """The number of inference requests without a complete response."""
        return self._ingress.answering

    async def refuse_new(self, timeout: float) -> int:
        """Refuse new and waiting requests; return the number of requests still in flight after `timeout`."""
        self._readiness.draining = True
        self._server.end_keepalive()
        self._queue.drain()
        try:
            async with asyncio.timeout(timeout):
                while self.remaining:
                    await asyncio.sleep(POLL_S)
                await self._server.flush()
        except TimeoutError:
            return self.remaining
        return 0

    async def hand_over(self, timeout: float, linger: float = LINGER_S) -> int:
        """Leave new connections to the next ingress, and answer what the open ones send.

        After `timeout`, requests that wait for a replica are refused. Returns the number of those in flight then.
        """
        self._readiness.draining = True
        self._server.stop_accepting()
        self._server.end_keepalive()
        try:
            async with asyncio.timeout(timeout):
                await self._server.idle(linger)
        except TimeoutError:
            return await self.refuse_new(linger)
        return 0

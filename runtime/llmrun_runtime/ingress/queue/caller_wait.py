"""One request's wait for a replica: its deadline, and keepalive comments during the wait."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from llmrun_runtime.ingress.admission.request import MAX_WAIT_HEADER
from llmrun_runtime.ingress.errors import NOT_READY, HTTPError
from llmrun_runtime.ingress.queue.claim import ANONYMOUS, Caller, Claim, WaitLimit
from llmrun_runtime.ingress.queue.keepalive import KeepaliveStream
from llmrun_runtime.ingress.queue.request_queue import RequestQueue


class CallerWait:
    """The wait for a replica of the model `name`, over all attempts of one request.

    `max_wait`: the client's limit in seconds; LLMRUN_WAKE_TIMEOUT limits the wait as well.
    `keepalive`: where to send comments; None if the response is not streamed.
    """

    def __init__(
        self,
        queue: RequestQueue,
        name: str,
        max_wait: float | None,
        keepalive: KeepaliveStream | None,
        caller: Caller = ANONYMOUS,
    ) -> None:
        self._queue = queue
        self._caller = caller
        self._name = name
        self._keepalive = keepalive
        self._client_limited = max_wait is not None
        started = asyncio.get_running_loop().time()
        if max_wait is not None and max_wait <= queue.wake_timeout:
            self._limit = WaitLimit(started, started + max_wait, MAX_WAIT_HEADER)
        else:
            self._limit = WaitLimit(started, started + queue.wake_timeout, "LLMRUN_WAKE_TIMEOUT")

    async def claim(self, avoid: Collection[str]) -> Claim:
        """See `RequestQueue.claim`."""
        claim = self._queue.claim(self._name, self._limit, avoid, self._caller)
        claiming = asyncio.ensure_future(claim)
        try:
            if self._keepalive:
                await self._comment_until(claiming, self._keepalive)
            else:
                await asyncio.wait({claiming})
            return claiming.result()
        except HTTPError as error:
            if self._client_limited and error.code == NOT_READY:
                self._queue.hold_wake(self._name)
            raise
        except BaseException:
            await self._cancel(claiming)
            raise

    async def _comment_until(self, claiming: asyncio.Future[Claim], keepalive: KeepaliveStream) -> None:
        loop = asyncio.get_running_loop()
        pause = max(0.0, self._limit.started + keepalive.timing.first - loop.time())
        while not (await asyncio.wait({claiming}, timeout=pause))[0]:
            pause = keepalive.timing.interval
            await keepalive.comment(self._queue.describe_wait(self._name, loop.time() - self._limit.started))

    async def _cancel(self, claiming: asyncio.Future[Claim]) -> None:
        """Cancel the claim, and release it if it was granted at the same moment."""
        claiming.cancel()
        (result,) = await asyncio.gather(claiming, return_exceptions=True)
        if isinstance(result, Claim):
            self._queue.release(result)

"""One caller's wait for a replica: its deadline, and what it hears meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from llmrun_runtime.ingress.errors import NOT_READY, HTTPError
from llmrun_runtime.ingress.queue.keepalive import EVERY_S, QUIET_S, KeepaliveStream
from llmrun_runtime.ingress.queue.request_queue import NOBODY, Caller, Claim, RequestQueue


class CallerWait:
    """How long the caller of `name` waits in all: `limit` seconds at most, and never longer than the ingress lets it.

    `early` is where a streaming caller hears of its wait; None for one that just waits.
    """

    def __init__(
        self,
        waiting: RequestQueue,
        name: str,
        limit: float | None,
        early: KeepaliveStream | None,
        caller: Caller = NOBODY,
    ) -> None:
        self._waiting = waiting
        self._caller = caller
        self._name = name
        self._early = early
        self._began = asyncio.get_running_loop().time()
        self._limited = limit is not None
        most = waiting.wake_timeout
        self._deadline = self._began + (most if limit is None else min(limit, most))

    async def claim(self, avoid: Collection[str]) -> Claim:
        """See `RequestQueue.claim`."""
        claim = self._waiting.claim(self._name, self._deadline, avoid, self._began, self._caller)
        claiming = asyncio.ensure_future(claim)
        loop = asyncio.get_running_loop()
        pause = max(0.0, self._began + QUIET_S - loop.time())
        try:
            while not (await asyncio.wait({claiming}, timeout=pause if self._early else None))[0]:
                pause = EVERY_S
                if self._early:
                    await self._early.comment(self._waiting.describe(self._name, loop.time() - self._began))
            return claiming.result()
        except HTTPError as refusal:
            if self._limited and refusal.code == NOT_READY:
                self._waiting.hold(self._name)
            raise
        except BaseException:
            await self._drop(claiming)
            raise

    async def _drop(self, claiming: asyncio.Future[Claim]) -> None:
        """The caller has left, perhaps in the moment in which its claim came."""
        claiming.cancel()
        (found,) = await asyncio.gather(claiming, return_exceptions=True)
        if isinstance(found, Claim):
            self._waiting.release(found)

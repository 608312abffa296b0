"""Keeps a process's background tasks running: an unexpected exception is logged and counted, and the task restarts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger("llmrun")
RETRY_S = 1.0


async def supervise(name: str, work: Callable[[], Awaitable[None]], on_error: Callable[[str], None]) -> None:
    """Run `work` again RETRY_S after each exception, until it returns. `on_error` receives the task's name."""
    while True:
        try:
            await work()
        except Exception:  # nobody else awaits the task
            log.exception("%s failed, restarting it in %g s", name, RETRY_S)
            on_error(name)
            await asyncio.sleep(RETRY_S)
        else:
            return

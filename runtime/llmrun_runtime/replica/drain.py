"""Decides when an engine may be stopped: nothing has been in flight for a while and it accepts no more requests.

Does not depend on a particular engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

# Ingresses may route requests by the old table for as long, if control cannot tell that all have a newer one.
LINGER_S = 1.0
# An engine that has not responded for this long counts as dead.
UNRESPONSIVE_S = 120.0
POLL_S = 0.1


async def wait_until_drained(
    in_flight: Callable[[bool], Awaitable[int | None]], timeout: float, linger: float = LINGER_S
) -> str:
    """Return "" when the engine may be stopped, or the reason for giving up, within `timeout` seconds.

    `in_flight(leave)` returns the engine's requests in flight, None if it does not respond. With `leave`, the engine
    accepts no more requests if that number is 0. Only this last response counts, not the elapsed time: this process may
    itself have been delayed.
    """
    started = responded = time.monotonic()
    idle_since = None if linger else started
    while (now := time.monotonic()) - started < timeout:
        lingered = idle_since is not None and now - idle_since >= linger
        count = await in_flight(lingered)
        if count is not None:
            responded = time.monotonic()
        elif now - responded > UNRESPONSIVE_S:
            return f"the engine has not responded for {UNRESPONSIVE_S:g} s"
        if count == 0 and lingered:
            return ""
        if count != 0:  # no response counts as busy
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
        await asyncio.sleep(POLL_S)
    return f"requests are still in flight after {timeout:g} s (LLMRUN_DRAIN_TIMEOUT)"

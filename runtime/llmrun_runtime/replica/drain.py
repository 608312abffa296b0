"""When an engine may be ended: once nothing has been in flight for a while and it takes no more. Knows no engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

# The ingress hears of a deregistration through its long poll; for so long a request may still come by the old table.
LINGER_S = 1.0
# An engine that answers nothing for so long is taken for dead.
SILENT_S = 120.0
POLL_S = 0.1


async def drained(ask: Callable[[bool], Awaitable[int | None]], timeout: float, linger: float = LINGER_S) -> str:
    """Return "" once the engine may be ended, or, before `timeout` seconds are over, why it is waited for no longer.

    `ask(leave)` gives its requests in flight, None if it does not answer; with `leave` it takes no request from then on
    if that is 0. What counts is that last answer and no clock: this process may itself have been held up.
    """
    begun = answered = time.monotonic()
    quiet_since: float | None = None
    while (now := time.monotonic()) - begun < timeout:
        lingered = quiet_since is not None and now - quiet_since >= linger
        in_flight = await ask(lingered)
        if in_flight is not None:
            answered = time.monotonic()
        elif now - answered > SILENT_S:
            return f"the engine has not answered for {SILENT_S:g} s"
        if in_flight == 0 and lingered:
            return ""
        if in_flight != 0:  # no answer: busy
            quiet_since = None
        elif quiet_since is None:
            quiet_since = time.monotonic()
        await asyncio.sleep(POLL_S)
    return f"requests are in flight after {timeout:g} s (LLMRUN_DRAIN_TIMEOUT)"

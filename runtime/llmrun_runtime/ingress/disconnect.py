"""Cancels work when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from llmrun_runtime.asgi import Receive


async def cancel_on_disconnect(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work`; cancel it, and with it the engine's, if the client disconnects first."""
    task = asyncio.current_task()
    assert task
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    # `work` runs in this task: one of its own, and waiting for both, would take a tenth of the ingress's time.
    watcher = asyncio.ensure_future(watch())
    try:
        await work
    except asyncio.CancelledError:
        if not left or task.cancelling() > 1:  # somebody else cancels this task
            raise
    finally:
        if left:
            task.uncancel()
        watcher.cancel()

"""Decides whether an engine hangs: it responds to its replica, but produces nothing for the requests in flight.

Does not depend on a particular engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from llmrun.errors import EngineError

# At most; the engine has then produced nothing for as long as `stall_timeout` and this.
PROBE_TIMEOUT_S = 60.0
HEALTH_PATH = "/health"
# A request for one token, or the shortest one of another task, at each path; the first that an engine serves is used.
PROBES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "1", "max_tokens": 1, "temperature": 0},
    "/v1/embeddings": {"input": "1"},
    "/classify": {"input": "1"},
    "/v1/score": {"text_1": "1", "text_2": "1"},
}
TASK_PATHS = {"embed": "/v1/embeddings", "classify": "/classify", "score": "/v1/score"}


def probe_request(paths: Iterable[str], task: str, model: str) -> tuple[str, dict[str, Any] | None]:
    """Return the path and the body of a probe. Without a path in `paths` that has one: a GET of the engine's health."""
    served = set(paths)
    for path in (TASK_PATHS.get(task, ""), *PROBES):
        if path in served and path in PROBES:
            return path, {"model": model, **PROBES[path]}
    return HEALTH_PATH, None


class StallWatch:
    """Checks the states of one engine. `timeout`: seconds without output that make it suspicious; 0: never.

    `probe(limit)` asks the engine for an output: returns whether an answer came within `limit` seconds; raises
    EngineError if the engine cannot be reached.
    """

    def __init__(self, timeout: float, probe: Callable[[float], Awaitable[bool]]) -> None:
        self._timeout = timeout or math.inf
        self._limit = min(self._timeout, PROBE_TIMEOUT_S)
        self._probe = probe
        self._probing: asyncio.Future[bool] | None = None
        self._answered_at = -math.inf

    def check(self, state: Mapping[str, Any], now: float) -> str:
        """Return why the engine counts as hanging, "" if it does not. `now`: `time.monotonic()`.

        1. Any output resets the clock and ends a probe.
        2. After `timeout` seconds without one, a probe starts; this method does not wait for it.
        3. A probe that is answered resets the clock, too.
        """
        # 1.
        stalled = state["stalled_s"]
        if min(stalled, now - self._answered_at) < self._timeout:
            self.stop()
            return ""
        # 2.
        if self._probing is None:
            self._probing = asyncio.ensure_future(self._probe(self._limit))
        if not self._probing.done():
            return ""
        # 3.
        probing, self._probing = self._probing, None
        with contextlib.suppress(EngineError):  # an engine that ends; if not, the next check probes again
            if probing.result():
                self._answered_at = now
                return ""
            text = f"the engine hangs: no output for {stalled:.0f} s with {state['in_flight']} requests in flight"
            return f"{text}, and a probe got none in {self._limit:g} s"
        return ""

    def stop(self) -> None:
        """End the probe in progress, if any."""
        if self._probing:
            self._probing.cancel()
            self._probing = None

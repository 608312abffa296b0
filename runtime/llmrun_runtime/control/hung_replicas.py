"""Ends replicas that live and do not report: their process is stopped, or hangs.

Serve notices one only after three health checks of 30 s each, and then waits for its graceful shutdown as long as
streams may take to drain. Until then, its engine would keep its GPU.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import ray
from ray.serve.exceptions import RayServeException

from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.ray_internals import kill_serve_replica
from llmrun_runtime.wire.reports import LEASE_S, ReplicaReport

log = logging.getLogger("llmrun.control")
POLL_S = 2.0
# After control has removed it from the routing table, so that reports that a busy control received late still count.
SILENT_S = 15.0


class HungReplicas:
    """Replicas that control has not heard from."""

    def __init__(self, registry: Registry, on_hung: Callable[[ReplicaReport, str], None]) -> None:
        self._registry = registry
        self._on_hung = on_hung

    async def run(self) -> None:
        """Check every POLL_S, forever."""
        while True:
            await asyncio.sleep(POLL_S)
            await self.check(time.monotonic())

    async def check(self, now: float) -> None:
        """End those that have been silent for too long, if Serve still runs them. `now` is monotonic."""
        silent = self._registry.silent
        for report, since in list(silent.values()):
            if now - since <= SILENT_S or report.id not in silent:  # it has reported meanwhile, or stopped
                continue
            try:
                killed = await asyncio.to_thread(kill_serve_replica, report.id)
            except (ray.exceptions.RayError, RayServeException, ValueError) as error:  # it may just be ending
                log.warning("%r does not report, and could not be ended: %r", report, error)
                continue
            silent.pop(report.id, None)
            if killed:
                cause = f"its replica did not report for {LEASE_S + SILENT_S:g} s, so it was ended"
                log.warning("%r: %s", report, cause)
                self._on_hung(report, cause)

"""Control as a Ray actor: receives the reports of replicas and ingresses, and serves the HTTP API."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from llmrun.settings import Settings
from llmrun_runtime import http
from llmrun_runtime.control.api.app import make_api
from llmrun_runtime.control.control_plane import ControlPlane
from llmrun_runtime.logs import log_to_file
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.wire.reports import AdapterRevision, LocalUsage, RemoteUsage, ReplicaReport, Subject, Traffic
from llmrun_runtime.wire.routing_table import Table

log = logging.getLogger("llmrun.control")


class Control:
    """The actor's class. Replicas, node agents and ingresses call its public methods."""

    async def __init__(self, settings: dict[str, Any], url: str) -> None:  # type: ignore[misc] # Ray awaits it
        log_to_file(Settings.model_validate(settings).root, "control")
        self._socket = http.bind("127.0.0.1", 0)
        host, port = self._socket.getsockname()
        self._plane = ControlPlane(Settings.model_validate(settings), url, (host, port))
        self._loading: asyncio.Task[None] | None = None
        self._running: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the stored state and start the loops, once.

        Every call runs this first, because Ray restarts a crashed control without calling it.
        """
        failed = self._loading and self._loading.done() and self._loading.exception()
        if self._loading is None or failed:  # the database may be available again
            self._loading = asyncio.get_running_loop().create_task(self._load())
        await asyncio.shield(self._loading)

    async def _load(self) -> None:
        plane, loop = self._plane, asyncio.get_running_loop()
        await plane.load()
        loops = [
            plane.autoscaler.run(),
            plane.warm_nodes.run(),
            plane.usage.run(plane.live_replicas),
            plane.adapters.run(),
            http.serve(make_api(plane), self._socket),
        ]
        self._running = [loop.create_task(each) for each in loops]

    async def report(self, report: ReplicaReport) -> None:
        """Receive a replica's report."""
        await self.start()
        plane = self._plane
        changed = plane.registry.report(report, time.monotonic())
        plane.usage.report(report, time.time())
        plane.metrics.report(report)
        plane.adapters.report(report, time.time())
        plane.deployer.on_report(report)
        if changed:
            if report.state == "ready":
                plane.cold_starts.replica_ready(report)
                plane.autoscaler.replica_ready(report)
            plane.autoscaler.kick()

    async def failed(self, report: ReplicaReport, cause: str) -> None:
        """Receive the last report of a replica that failed to start."""
        await self.start()
        self._plane.registry.remove(report.id)
        self._plane.usage.forget(report.id)
        if not self._plane.deployer.on_report(report, cause):
            self._plane.autoscaler.replica_failed(report, cause)

    async def stopped(self, report: ReplicaReport, cause: str = "") -> None:
        """Receive the last report of a replica that stopped; `cause` is set if its engine died."""
        plane = self._plane
        if cause:
            plane.autoscaler.engine_died(report, cause)
        plane.usage.report(report, time.time())
        plane.metrics.report(report)
        plane.usage.forget(report.id)
        if plane.registry.remove(report.id):
            plane.autoscaler.kick()

    async def demand(
        self,
        ingress: str,
        traffic: dict[str, Traffic],
        first_tokens: dict[str, float],
        usage: dict[Subject, LocalUsage],
    ) -> dict[Subject, RemoteUsage]:
        """Receive an ingress's report. Return the usage of subjects with limits that it cannot count itself.

        `traffic` is by model, `first_tokens` by replica (Unix times, for requests that had waited).
        """
        await self.start()
        self._plane.registry.report_traffic(ingress, traffic, time.monotonic(), usage)
        self._plane.cold_starts.first_tokens(first_tokens)
        self._plane.autoscaler.kick()
        return self._plane.remote_usage(ingress, time.time())

    async def watch(self, epoch: str, number: int, timeout: float) -> Table:
        """See `Autoscaler.watch`."""
        await self.start()
        return await self._plane.autoscaler.watch(epoch, number, timeout)

    async def weights_elsewhere(self, pin_id: str, node: str) -> tuple[list[Peer], list[str]]:
        """See `WeightsCatalog.elsewhere`."""
        await self.start()
        return await self._plane.weights.elsewhere(pin_id, node)

    async def adapter(self, model: str, name: str, pin_id: str) -> Adapter:
        """See `AdaptersCatalog.find`."""
        await self.start()
        return self._plane.adapters.find(model, name, pin_id)

    async def revision(self, model: str, revised: str) -> AdapterRevision:
        """See `AdaptersCatalog.revision`."""
        await self.start()
        return await self._plane.adapters.revision(model, revised)

    async def package(self, digest: str) -> bytes:
        """Return a code package. Raises KeyError if it is not stored."""
        data = await asyncio.to_thread(self._plane.database.package, digest)
        if data is None:
            raise KeyError(digest)
        return data

"""Control as an actor: hears replicas and ingresses, and serves the HTTP API."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from llmrun.settings import Settings
from llmrun_runtime import http
from llmrun_runtime.control.api import make_api
from llmrun_runtime.control.control_plane import ControlPlane
from llmrun_runtime.logs import log_to_file
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.wire.reports import AdapterRevision, LocalUsage, RemoteUsage, ReplicaReport, Subject, Traffic
from llmrun_runtime.wire.routing_table import Table

log = logging.getLogger("llmrun.control")


class Control:
    """The actor's class. Its methods are what replicas and ingresses call."""

    async def __init__(self, settings: dict[str, Any], url: str) -> None:  # type: ignore[misc] # Ray awaits it
        log_to_file(Settings.model_validate(settings).root, "control")
        self._socket = http.bind("127.0.0.1", 0)
        host, port = self._socket.getsockname()
        self._parts = ControlPlane(Settings.model_validate(settings), url, (host, port))
        self._loaded: asyncio.Task[None] | None = None
        self._running: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load what is stored and begin. Every call comes through here: Ray restarts a crashed control unasked."""
        failed = self._loaded and self._loaded.done() and self._loaded.exception()
        if self._loaded is None or failed:  # a store that was away may be back
            self._loaded = asyncio.get_running_loop().create_task(self._load())
        await asyncio.shield(self._loaded)

    async def _load(self) -> None:
        await self._parts.load()
        loop = asyncio.get_running_loop()
        api = http.serve(make_api(self._parts), self._socket)
        parts = self._parts
        tasks = (parts.scaling.run(), parts.warming.run(), parts.usage.run(parts.living), parts.adapters.run(), api)
        self._running = [loop.create_task(task) for task in tasks]

    async def report(self, report: ReplicaReport) -> None:
        """A replica says how it is."""
        await self.start()
        changed = self._parts.registry.report(report, time.monotonic())
        self._parts.usage.report(report, time.time())
        self._parts.metrics.report(report)
        self._parts.adapters.report(report, time.time())
        self._parts.deployer.heard(report)
        if changed:
            if report.state == "ready":
                self._parts.starts.ready(report)
                self._parts.scaling.started(report)
            self._parts.scaling.kick()

    async def failed(self, report: ReplicaReport, cause: str) -> None:
        """A replica says that it did not start."""
        await self.start()
        self._parts.registry.remove(report.id)
        self._parts.usage.gone(report.id)
        if not self._parts.deployer.heard(report, cause):
            self._parts.scaling.failed(report, cause)

    async def gone(self, report: ReplicaReport, cause: str = "") -> None:
        """A replica says that it has ended, or that its engine has died, and of what."""
        if cause:
            self._parts.scaling.died(report, cause)
        self._parts.usage.report(report, time.time())
        self._parts.metrics.report(report)
        self._parts.usage.gone(report.id)
        if self._parts.registry.remove(report.id):
            self._parts.scaling.kick()

    async def demand(
        self,
        ingress: str,
        traffic: dict[str, Traffic],
        first_tokens: dict[str, float],
        spent: dict[Subject, LocalUsage],
    ) -> dict[Subject, RemoteUsage]:
        """An ingress says what waits there, what is in flight, when those that had waited were answered, and what those
        with limits have asked; it hears what of that it cannot see itself."""
        await self.start()
        self._parts.registry.demand(ingress, traffic, time.monotonic(), spent)
        self._parts.starts.first_tokens(first_tokens)
        self._parts.scaling.kick()
        return self._parts.elsewhere(ingress, time.time())

    async def watch(self, epoch: str, number: int, timeout: float) -> Table:
        """See `Autoscaler.watch`."""
        await self.start()
        return await self._parts.scaling.watch(epoch, number, timeout)

    async def weights_elsewhere(self, pin_id: str, node: str) -> tuple[list[Peer], list[str]]:
        """See `WeightsCatalog.elsewhere`."""
        await self.start()
        return await self._parts.stock.elsewhere(pin_id, node)

    async def adapter(self, model: str, name: str, pin_id: str) -> Adapter:
        """See `Adapters.find`."""
        await self.start()
        return self._parts.adapters.find(model, name, pin_id)

    async def revision(self, model: str, called: str) -> AdapterRevision:
        """See `Adapters.revision`."""
        await self.start()
        return await self._parts.adapters.revision(model, called)

    async def package(self, digest: str) -> bytes:
        """A code package. Raises KeyError."""
        data = await asyncio.to_thread(self._parts.database.package, digest)
        if data is None:
            raise KeyError(digest)
        return data

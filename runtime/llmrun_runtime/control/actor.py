"""Control as a Ray actor: receives the reports of replicas and ingresses, and serves the HTTP API."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from sqlalchemy.exc import SQLAlchemyError

from llmrun.errors import ClusterError
from llmrun.settings import Settings
from llmrun_runtime import http
from llmrun_runtime.actors import ClusterActors
from llmrun_runtime.control.api.app import make_api
from llmrun_runtime.control.control_plane import ControlPlane
from llmrun_runtime.control.ingresses import keep_ingresses
from llmrun_runtime.control.state.connection import describe_error
from llmrun_runtime.logs import log_to_file
from llmrun_runtime.niceness import run_at_normal_priority
from llmrun_runtime.supervise import supervise
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.wire.reports import (
    AdapterRevision,
    LocalUsage,
    RemoteUsage,
    ReplicaReport,
    Subject,
    Traffic,
    UsedOnNodes,
)
from llmrun_runtime.wire.routing_table import Table

log = logging.getLogger("llmrun.control")
RELOAD_S = 1.0


class Control:
    """The actor's class. Replicas, node agents and ingresses call its public methods."""

    async def __init__(self, actors: ClusterActors) -> None:  # type: ignore[misc] # Ray awaits it
        run_at_normal_priority()
        # Nothing here may fail for a while: Ray never restarts an actor whose constructor raised.
        self._actors = actors
        self._settings, self._url = Settings.model_validate(actors.settings), actors.listening.url
        with contextlib.suppress(OSError):  # a full disk
            log_to_file(self._settings.root, "control")
        self._socket = http.bind("127.0.0.1", 0)
        self._made: ControlPlane | None = None
        self._loaded: ControlPlane | None = None
        self._loading: asyncio.Task[None] | None = None
        self._load_failed = 0.0
        self._running: list[asyncio.Task[None]] = []

    @property
    def _plane(self) -> ControlPlane:
        """The parts; only after `start`."""
        assert self._loaded
        return self._loaded

    async def start(self) -> None:
        """Load the stored state and start the loops, once.

        Every call runs this first, because Ray restarts a crashed control without calling it. If loading fails, calls
        raise its error, and one of them tries again after RELOAD_S: the database may be available again.
        """
        failed = self._loading and self._loading.done() and self._loading.exception()
        if self._loading is None or (failed and time.monotonic() - self._load_failed > RELOAD_S):
            self._loading = asyncio.get_running_loop().create_task(self._load())
        await asyncio.shield(self._loading)

    async def _load(self) -> None:
        try:
            if self._made is None:  # once: its thread may still wait for the database
                self._made = ControlPlane(self._settings, self._url, self._socket.getsockname())
            plane = self._made
            await plane.load()
        except Exception as error:
            log.exception("could not load the stored state")
            self._load_failed = time.monotonic()
            if isinstance(error, SQLAlchemyError):
                raise ClusterError(describe_error(error)) from error
            raise
        self._loaded = plane
        work: dict[str, Callable[[], Awaitable[None]]] = {
            "nodes": plane.nodes.run,
            "autoscaler": plane.autoscaler.run,
            "warm nodes": plane.warm_nodes.run,
            "disk watch": plane.disk_watch.run,
            "hung replicas": plane.hung_replicas.run,
            "usage": lambda: plane.usage.run(plane.live_replicas),
            "adapters": plane.adapters.run,
            "ingresses": lambda: keep_ingresses(self._actors),
            "api": lambda: http.serve(make_api(plane), self._socket),
        }
        loop, count = asyncio.get_running_loop(), plane.metrics.count_error
        self._running = [loop.create_task(supervise(name, each, count)) for name, each in work.items()]

    async def report(self, report: ReplicaReport) -> None:
        """Receive a replica's report."""
        await self.start()
        plane = self._plane
        changed = plane.registry.report(report, time.monotonic())
        plane.usage.report(report, time.monotonic())
        plane.metrics.report(report)
        plane.adapters.report(report, time.time())
        plane.deployer.on_report(report)
        if changed:
            if report.state == "ready":
                plane.cold_starts.replica_ready(report)
                plane.autoscaler.replica_ready(report)
            plane.autoscaler.kick()

    async def draining(self, report: ReplicaReport) -> None:
        """Receive the report of a replica that will stop. Return when no ingress sends it requests any more."""
        await self.report(report)
        await self._plane.autoscaler.wait_until_unrouted(report)

    async def failed(self, report: ReplicaReport, cause: str) -> None:
        """Receive the last report of a replica that failed to start."""
        await self.start()
        plane = self._plane
        first_seen = plane.registry.first_seen.get(report.id, time.monotonic())
        plane.registry.remove(report.id)
        plane.usage.forget(report.id)
        if not plane.deployer.on_report(report, cause):
            plane.autoscaler.replica_failed(report, cause, first_seen)

    async def stopped(self, report: ReplicaReport, cause: str = "") -> None:
        """Receive the last report of a replica that stopped; `cause` is set if its engine died."""
        await self.start()
        plane = self._plane
        if cause:
            plane.autoscaler.engine_died(report, cause)
        else:
            plane.autoscaler.replica_stopped(report)
        plane.usage.report(report, time.monotonic())
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
        return self._plane.remote_usage(ingress, time.monotonic())

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

    async def used_on_nodes(self) -> UsedOnNodes:
        """See `Database.used_on_nodes`."""
        await self.start()
        return await self._plane.database.run(self._plane.database.used_on_nodes)

    async def package(self, digest: str) -> bytes:
        """Return a code package. Raises KeyError if it is not stored."""
        data = await self._plane.database.run(self._plane.database.package, digest)
        if data is None:
            raise KeyError(digest)
        return data

"""The ingress as a Ray actor: follows the routing table, reports demand to control, and listens on the public port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import time
import uuid
from collections.abc import Awaitable
from typing import Any

import ray

from llmrun.errors import ClusterError
from llmrun.settings import Settings
from llmrun_runtime import http
from llmrun_runtime.actors import INGRESS, NAMESPACE, control_handle, ingress_names
from llmrun_runtime.asgi import App
from llmrun_runtime.ingress.admission.rate_limits import Limiter
from llmrun_runtime.ingress.app import Ingress
from llmrun_runtime.ingress.cors import with_cors
from llmrun_runtime.ingress.endpoints.metrics import IngressMetrics
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.logs import log_to_file
from llmrun_runtime.wire.reports import AdapterRevision
from llmrun_runtime.wire.routing_table import share_of

log = logging.getLogger("llmrun.ingress")
POLL_S = 10.0
REPORT_S = 0.5
CALL_TIMEOUT_S = 5.0
RESOLVE_TIMEOUT_S = 30.0
RETRY_S = 0.2


class IngressActor:
    """The actor's class. It serves from its last routing table while control is not reachable."""

    async def __init__(  # type: ignore[misc] # Ray awaits it
        self, name: str, settings: dict[str, Any], host: str, port: int, insecure: bool
    ) -> None:
        parsed = Settings.model_validate(settings)
        log_to_file(parsed.root, name)
        self._others = [other for other in ingress_names(parsed.ingresses) if other != name]
        # Each stream needs two files.
        _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))
        self._id = uuid.uuid4().hex
        self._control = control_handle()
        self._dirty = asyncio.Event()
        self._queue = RequestQueue(parsed.wake_timeout, self._dirty.set)
        if name == INGRESS and self._others and not ray.get_runtime_context().was_current_actor_reconstructed:
            http.bind(host, port).close()  # fails if another cluster has the port; a shared bind would not
        self._socket = http.bind(host, port, shared=bool(self._others))
        self._limiter = Limiter()
        self._host = host
        self._keys_only = host not in http.LOOPBACK and not insecure
        loop = asyncio.get_running_loop()
        self._metrics = IngressMetrics(name, self._queue, self._other_metrics)
        app: App = Ingress(
            parsed, self._queue, self._limiter, self._metrics, self._resolve_revision, keys_only=self._keys_only
        )
        if parsed.cors_origins:
            app = with_cors(app, parsed.cors_origins)
        self._first_table = asyncio.Event()
        self._tasks = [loop.create_task(task) for task in (self._watch(), self._report(), self._serve(app))]

    async def start(self) -> None:
        """Return when the first routing table has arrived. Raises ClusterError if no request could be authenticated."""
        await self._first_table.wait()
        if self._keys_only and not self._queue.table.keys:
            raise ClusterError(
                f"--host {self._host} requires an API key, and none exists. Create one first (`llmrun up`, "
                f"`llmrun key create NAME`, `llmrun down`), or accept requests without keys with --insecure"
            )

    async def metrics(self) -> str:
        """Return this ingress's own metrics, for another ingress."""
        return await self._metrics.own()

    async def _resolve_revision(self, model: str, adapter: str) -> AdapterRevision:
        """See `Control.revision`; control continues to resolve it after the timeout."""
        try:
            call = self._control.revision.remote(model, adapter)
            revision: AdapterRevision = await asyncio.wait_for(call, RESOLVE_TIMEOUT_S)
        except TimeoutError:
            return AdapterRevision(error=f"its source did not respond within {RESOLVE_TIMEOUT_S:g} s")
        except ray.exceptions.RayError as error:
            return AdapterRevision(error=f"control is not reachable ({type(error).__name__})")
        return revision

    def _other_metrics(self) -> dict[str, Awaitable[str]]:
        return {name: self._metrics_of(name) for name in self._others}

    async def _metrics_of(self, name: str) -> str:
        """Raises RayError or ValueError if that ingress is not reachable."""
        text: str = await ray.get_actor(name, namespace=NAMESPACE).metrics.remote()
        return text

    async def _serve(self, app: App) -> None:
        """Serve once there is a routing table; until then, clients wait in the socket's backlog."""
        await self._first_table.wait()
        await http.serve(app, self._socket)

    async def _watch(self) -> None:
        while True:
            current = self._queue.table
            try:
                call = self._control.watch.remote(current.epoch, current.number, POLL_S)
                table = await asyncio.wait_for(call, POLL_S + CALL_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.warning("control is not reachable, serving from the last routing table: %s", type(error).__name__)
                await asyncio.sleep(RETRY_S)
                continue
            if (table.epoch, table.number) != (current.epoch, current.number):
                self._queue.update(share_of(table, 1 + len(self._others)))
            self._first_table.set()

    async def _report(self) -> None:
        """Report demand to control: at once when it changes, otherwise every REPORT_S."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._dirty.wait()
            self._dirty.clear()
            try:
                queue, usage = self._queue, self._limiter.usage(time.monotonic())
                call = self._control.demand.remote(self._id, queue.traffic(), queue.first_tokens(), usage)
                self._limiter.remote = await asyncio.wait_for(call, CALL_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError):
                await asyncio.sleep(RETRY_S)

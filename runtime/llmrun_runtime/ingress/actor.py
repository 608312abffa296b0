"""The ingress as an actor: keeps its table fresh, reports what waits, and listens on the public port."""

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
REVISE_S = 30.0
RETRY_S = 0.2


class IngressActor:
    """The actor's class; it serves from its last table while control is away."""

    async def __init__(  # type: ignore[misc] # Ray awaits it
        self, name: str, settings: dict[str, Any], host: str, port: int, insecure: bool
    ) -> None:
        parsed = Settings.model_validate(settings)
        log_to_file(parsed.root, name)
        self._others = [other for other in ingress_names(parsed.ingresses) if other != name]
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # two for each stream
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._id = uuid.uuid4().hex
        self._control = control_handle()
        self._dirty = asyncio.Event()
        self._waiting = RequestQueue(parsed.wake_timeout, self._dirty.set)
        if name == INGRESS and self._others and not ray.get_runtime_context().was_current_actor_reconstructed:
            http.bind(host, port).close()  # is it free at all? The next line would not hear of another's that is shared
        self._socket = http.bind(host, port, shared=bool(self._others))
        self._limiter = Limiter()
        self._host = host
        self._keys_only = host not in http.LOOPBACK and not insecure
        loop = asyncio.get_running_loop()
        self._metrics = IngressMetrics(name, self._waiting, self._metrics_of_others)
        parts = (self._waiting, self._limiter, self._metrics, self._revise)
        app: App = Ingress(parsed, *parts, keys_only=self._keys_only)
        if parsed.cors_origins:
            app = with_cors(app, parsed.cors_origins)
        self._first_table = asyncio.Event()
        self._tasks = [loop.create_task(task) for task in (self._watch(), self._report(), self._serve(app))]

    async def start(self) -> None:
        """Return when the first table has come. Raises ClusterError if nobody could come in."""
        await self._first_table.wait()
        if self._keys_only and not self._waiting.table.keys:
            raise ClusterError(
                f"--host {self._host}: there is no API key yet, and without keys only this machine is served: make one "
                f"first (`llmrun up`, `llmrun key create NAME`, `llmrun down`); --insecure lets everybody in who "
                f"reaches {self._host}"
            )

    async def metrics(self) -> str:
        """This ingress's own, for another one."""
        return await self._metrics.own()

    async def _revise(self, model: str, called: str) -> AdapterRevision:
        """See `Control.revision`; control goes on to ask when this has waited long enough."""
        try:
            found: AdapterRevision = await asyncio.wait_for(self._control.revision.remote(model, called), REVISE_S)
        except TimeoutError:
            return AdapterRevision(trouble=f"its source has not answered within {REVISE_S:g} s")
        except ray.exceptions.RayError as error:
            return AdapterRevision(trouble=f"control is away ({type(error).__name__})")
        return found

    def _metrics_of_others(self) -> dict[str, Awaitable[str]]:
        return {name: self._ask_for_metrics(name) for name in self._others}

    async def _ask_for_metrics(self, name: str) -> str:
        """Raises RayError or ValueError if it is away."""
        text: str = await ray.get_actor(name, namespace=NAMESPACE).metrics.remote()
        return text

    async def _serve(self, app: App) -> None:
        """Answer once there is a table: until then callers wait in the socket's backlog."""
        await self._first_table.wait()
        await http.serve(app, self._socket)

    async def _watch(self) -> None:
        while True:
            known = self._waiting.table
            try:
                call = self._control.watch.remote(known.epoch, known.number, POLL_S)
                table = await asyncio.wait_for(call, POLL_S + CALL_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                log.warning("control is away, serving from the last table: %s", type(error).__name__)
                await asyncio.sleep(RETRY_S)
                continue
            if (table.epoch, table.number) != (known.epoch, known.number):
                self._waiting.update(share_of(table, 1 + len(self._others)))
            self._first_table.set()

    async def _report(self) -> None:
        """Tell control what waits: at once when that changes, else every REPORT_S."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._dirty.wait()
            self._dirty.clear()
            try:
                waiting, spent = self._waiting, self._limiter.spent(time.time())
                call = self._control.demand.remote(self._id, waiting.traffic(), waiting.first_tokens(), spent)
                self._limiter.elsewhere = await asyncio.wait_for(call, CALL_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError):
                await asyncio.sleep(RETRY_S)

"""The ingress as a Ray actor: follows the routing table, reports demand to control, and listens on the public port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
import uuid
from collections.abc import Awaitable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from llmrun.errors import ClusterError
from llmrun.settings import LOOPBACK, Settings
from llmrun_runtime import http
from llmrun_runtime.actors import (
    NAMESPACE,
    ClusterActors,
    ControlClient,
    NoControl,
    actor_names,
    ingress_generation,
    older_ingresses,
)
from llmrun_runtime.asgi import App
from llmrun_runtime.ingress.admission.rate_limits import Limiter
from llmrun_runtime.ingress.app import Ingress
from llmrun_runtime.ingress.cors import with_cors
from llmrun_runtime.ingress.drain import Drain
from llmrun_runtime.ingress.endpoints.metrics import IngressMetrics
from llmrun_runtime.ingress.handover import receive_sockets, send_sockets
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.ingress.readiness import Readiness
from llmrun_runtime.logs import log_to_file
from llmrun_runtime.niceness import run_at_normal_priority
from llmrun_runtime.supervise import supervise
from llmrun_runtime.wire.reports import AdapterRevision
from llmrun_runtime.wire.routing_table import share_of

log = logging.getLogger("llmrun.ingress")
POLL_S = 10.0
REPORT_S = 0.5
# Between two reports: each queued, answered and finished request is a change.
MIN_REPORT_S = 0.05
CALL_TIMEOUT_S = 5.0
RESOLVE_TIMEOUT_S = 30.0
RETRY_S = 0.2
BIND_RETRY_S = 1.0


class IngressActor:
    """The actor's class. It serves from its last routing table while control is not reachable."""

    async def __init__(self, actors: ClusterActors, name: str) -> None:  # type: ignore[misc] # Ray awaits it
        run_at_normal_priority()
        # Nothing here may fail for a while: Ray never restarts an actor whose constructor raised.
        self._actors, self._name = actors, name
        self._settings = Settings.model_validate(actors.settings)
        with contextlib.suppress(OSError, ClusterError):  # a full disk
            self._settings.open_home()
            log_to_file(self._settings.root, name.partition("-r")[0])  # one log for all generations
        # Each stream needs two files.
        _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))
        self._id = uuid.uuid4().hex
        self._control = ControlClient()
        self._dirty = asyncio.Event()
        self._queue = RequestQueue(self._settings.wake_timeout, self._dirty.set)
        self._limiter = Limiter()
        self._others = [other for other in actors.ingress_names if other != name]
        self._older: list[str] = []
        """The ingresses of earlier generations that still drain."""
        self._sockets: list[socket.socket] = []
        listening = actors.listening
        self._keys_only = listening.host not in LOOPBACK and not listening.insecure
        self._metrics = IngressMetrics(name, self._queue, self._other_metrics)
        self._readiness = Readiness()
        ingress = Ingress(
            self._settings,
            self._queue,
            self._limiter,
            self._metrics,
            self._resolve_revision,
            self._readiness,
            keys_only=self._keys_only,
            admin_host=listening.admin_host,
        )
        app: App = with_cors(ingress, self._settings.cors_origins) if self._settings.cors_origins else ingress
        self._server = http.HTTPServer(app, listening, self._settings.keepalive_timeout)
        self._drain = Drain(self._queue, ingress, self._server, self._readiness)
        self._first_table = asyncio.Event()
        self._ended = False
        loop = asyncio.get_running_loop()
        self._listening: asyncio.Future[None] = loop.create_future()
        """Has the ClusterError if the port is in use at first."""
        work = {"routing table": self._watch, "reports": self._report, "server": self._serve}
        self._tasks = [loop.create_task(supervise(task, run, self._metrics.count_error)) for task, run in work.items()]

    async def start(self) -> None:
        """Return when this ingress listens. Raises ClusterError if it cannot, or could authenticate no request."""
        await self._first_table.wait()
        if self._keys_only and not self._queue.table.keys:
            raise ClusterError(
                f"--host {self._actors.listening.host} requires an API key, and none exists. Create one "
                f"first (`llmrun up`, `llmrun key create NAME`, `llmrun down`), or accept requests without keys with "
                f"--insecure"
            )
        await asyncio.shield(self._listening)

    async def drain(self, timeout: float) -> int:
        """Refuse new requests; return how many are still in flight after at most `timeout` seconds."""
        self._ended = True
        return await self._drain.refuse_new(timeout)

    async def remaining(self) -> int:
        """Return the number of requests without a complete response."""
        return self._drain.remaining

    async def describe(self) -> dict[str, Any]:
        """Return the fields of the cluster's `ClusterActors`, for a later generation."""
        return asdict(self._actors)

    async def metrics(self) -> str:
        """Return this ingress's own metrics, for another ingress."""
        return await self._metrics.own()

    async def share_sockets(self, path: str) -> None:
        """Send the listening sockets to the next ingress, which listens on the Unix socket `path`. Raises OSError."""
        await asyncio.to_thread(send_sockets, Path(path), self._sockets)

    async def retire(self) -> None:
        """Leave new connections to the next generation, and exit when the open ones have ended."""
        if not self._ended:
            self._ended = True
            self._tasks.append(asyncio.get_running_loop().create_task(self._retire()))

    async def _retire(self) -> None:
        for sock in self._sockets:
            sock.close()  # the server has its own copies, which it closes
        self._sockets = []
        remaining = await self._drain.hand_over(self._settings.drain_timeout)
        log.info("replaced by the next generation, exiting (%d requests in flight)", remaining)
        await self._exit()

    async def _exit(self) -> None:
        """End this actor, for good."""
        await asyncio.to_thread(ray.kill, ray.get_runtime_context().current_actor)

    async def _resolve_revision(self, model: str, adapter: str) -> AdapterRevision:
        """See `Control.revision`; control continues to resolve it after the timeout."""
        try:
            revision: AdapterRevision = await self._control.call("revision", model, adapter, timeout=RESOLVE_TIMEOUT_S)
        except TimeoutError:
            return AdapterRevision(error=f"its source did not respond within {RESOLVE_TIMEOUT_S:g} s")
        except ray.exceptions.RayError as error:
            return AdapterRevision(error=f"control is not reachable ({type(error).__name__})")
        return revision

    def _other_metrics(self) -> dict[str, Awaitable[str]]:
        return {name: self._metrics_of(name) for name in (*self._others, *self._older)}

    async def _metrics_of(self, name: str) -> str:
        """Raises RayError or ValueError if that ingress is not reachable."""
        try:
            actor = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
        except ValueError:
            if name in self._older:
                self._older.remove(name)
            raise
        text: str = await actor.metrics.remote()
        return text

    async def _serve(self) -> None:
        """Serve once there is a routing table; until then, clients wait in the socket's backlog."""
        self._sockets = self._sockets or await self._listen()
        await self._first_table.wait()
        serving = asyncio.ensure_future(self._server.serve([sock.dup() for sock in self._sockets]))
        if not self._listening.done():
            self._listening.set_result(None)
        for name in self._predecessors():
            await self._retire_older(name)
        await serving

    async def _listen(self) -> list[socket.socket]:
        """The sockets of the ingresses that this one replaces, else a new one. Waits while the port is in use."""
        names = [name for name in await asyncio.to_thread(actor_names) if name != self._name]
        if any((ingress_generation(name) or 0) > self._actors.generation for name in names):
            await self._exit()  # it crashed while it drained, and Ray restarted it
        self._older = older_ingresses(names, self._actors.generation)
        sockets = [sock for name in self._predecessors() for sock in await self._inherit(name)]
        # A shared bind succeeds beside another cluster of this user. A first ingress must not.
        alone = not self._older and not set(self._others) & set(names)
        while not sockets:
            try:
                host, port = self._actors.listening.host, self._actors.listening.port
                if alone:
                    http.bind(host, port).close()
                sockets = [http.bind(host, port, shared=True)]
            except ClusterError as error:
                log.warning("%s", error)
                if not self._listening.done():
                    self._listening.set_exception(error)
                    self._listening.exception()  # `start` may not be called, and the loop would log it
                await asyncio.sleep(BIND_RETRY_S)
        return sockets

    def _predecessors(self) -> list[str]:
        """The older ingresses whose sockets this one takes over: each belongs to one ingress of this generation."""
        names = self._actors.ingress_names
        return [older for index, older in enumerate(self._older) if names[index % len(names)] == self._name]

    async def _inherit(self, name: str) -> list[socket.socket]:
        """The listening sockets of an older ingress; none if it does not respond."""
        path = self._settings.root / "handover" / f"{self._id}.sock"
        try:
            return await receive_sockets(path, lambda: self._call_older(name, "share_sockets", str(path)))
        except (OSError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            log.warning("cannot take over the sockets of %s: %r", name, error)
            return []

    async def _retire_older(self, name: str) -> None:
        try:
            await self._call_older(name, "retire")
        except (ValueError, TimeoutError, ray.exceptions.RayError) as error:
            log.warning("%s does not respond, so it cannot drain: %r", name, error)

    async def _call_older(self, name: str, method: str, *args: Any) -> None:
        actor = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
        await asyncio.wait_for(getattr(actor, method).remote(*args), CALL_TIMEOUT_S)

    async def _watch(self) -> None:
        """Follow the routing table, and create control if there is none. Never returns."""
        while True:
            current = self._queue.table
            try:
                table = await self._control.call(
                    "watch", current.epoch, current.number, POLL_S, timeout=POLL_S + CALL_TIMEOUT_S
                )
            except NoControl:
                self._readiness.control_cause = ""
                if not self._ended:
                    log.warning("there is no actor control: creating it")
                    await asyncio.to_thread(self._actors.create_control)
                continue
            except (ray.exceptions.RayError, TimeoutError) as error:
                self._readiness.control_cause = _own_words(error)
                cause = self._readiness.control_cause or type(error).__name__
                log.warning("control is not reachable, serving from the last routing table: %s", cause)
                await asyncio.sleep(RETRY_S)
                continue
            if (table.epoch, table.number) != (current.epoch, current.number):
                self._queue.update(share_of(table, 1 + len(self._others)))
            self._readiness.heard(time.monotonic())
            self._first_table.set()

    async def _report(self) -> None:
        """Report demand to control: when it changes, otherwise every REPORT_S. Never returns."""
        last = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._dirty.wait()
            await asyncio.sleep(last + MIN_REPORT_S - time.monotonic())  # at most 0: no pause
            last = time.monotonic()
            self._dirty.clear()
            try:
                queue, usage = self._queue, self._limiter.usage(time.monotonic())
                remote = await self._control.call(
                    "demand", self._id, queue.traffic(), queue.first_tokens(), usage, timeout=CALL_TIMEOUT_S
                )
                self._limiter.set_remote(remote, time.monotonic())
            except (ray.exceptions.RayError, TimeoutError):
                await asyncio.sleep(RETRY_S)


def _own_words(error: Exception) -> str:
    """Return the error that control raised, in one line; "" if it did not respond."""
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
    return str(cause) if isinstance(cause, ClusterError) else ""

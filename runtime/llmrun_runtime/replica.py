"""The Serve deployment: a thin actor that owns one engine process.

Starts the engine, registers it with control, renews that while it runs, and drains before it ends.
Imports no engine; Serve never sends it a request: bytes go from the ingress to the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import time
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray

from llmrun.errors import EngineError, LLMRunError
from llmrun.settings import Settings
from llmrun.wire import ReplicaState
from llmrun_runtime.actors import control_handle
from llmrun_runtime.draining import LINGER_S, SILENT_S, drained
from llmrun_runtime.engines.base import Launch, Member
from llmrun_runtime.engines.begin import Begun
from llmrun_runtime.engines.child import listens
from llmrun_runtime.engines.headstart import adopt, headstart_socket
from llmrun_runtime.engines.keeper import warm_socket
from llmrun_runtime.engines.kinds import get_engine
from llmrun_runtime.engines.meter import Row
from llmrun_runtime.engines.process import EngineProcess
from llmrun_runtime.environments import Environments
from llmrun_runtime.launching import ReplicaConfig, find_weights, make_launch
from llmrun_runtime.logs import log_path
from llmrun_runtime.node import agent_on
from llmrun_runtime.reports import REPORT_S, Registration
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.pin import Pin

T = TypeVar("T")
log = logging.getLogger("ray.serve")
CONTROL_TIMEOUT_S = 10
AGENT_TIMEOUT_S = 10


class Replica:
    """One running copy of a model's version."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = ReplicaConfig.model_validate(config)
        self._control = control_handle()
        context = ray.get_runtime_context()
        self._id = context.get_actor_id()
        self._node = context.get_node_id()
        self._host = ray.util.get_node_ip_address()
        self._devices = tuple(context.get_accelerator_ids().get("GPU", ()))
        self._log = log_path(Settings().root, self._config.spec.name, self._config.version, self._id)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._engine: EngineProcess | None = None
        self._state: ReplicaState = "starting"
        self._counts: dict[str, Any] = {}
        self._told: dict[tuple[str, str], Row] = {}
        self._max_model_len = 0
        self._failed = ""
        self._answered = time.monotonic()
        self._moments = {"placed": time.time()}
        loop = asyncio.get_running_loop()
        self._starting = loop.create_task(self._start())
        self._reporting = loop.create_task(self._report_always())

    async def check_health(self) -> None:
        """Raise once the engine did not start or has died: Serve then replaces this replica, if it is still wanted."""
        if self._failed:
            raise EngineError(self._failed)
        for task in (self._starting, self._reporting):
            if task.done():
                task.result()

    async def __del__(self) -> None:
        """Drain: leave the table, linger, wait until nothing is in flight, end the engine."""
        was_ready, self._state = self._state == "ready", "draining"
        self._say("draining")
        await self._report()
        if was_ready and not self._failed:
            await self._drain()
        for task in (self._starting, self._reporting):
            task.cancel()
        await asyncio.gather(self._starting, self._reporting, return_exceptions=True)
        if self._engine:
            await self._engine.end()
        self._say("ended")
        await self._tell_control("gone", self._registration())

    async def _drain(self) -> None:
        """Return once the engine may be ended."""

        async def ask(leave: bool) -> int | None:
            if not self._engine or self._engine.ended():
                return 0
            return int(self._counts["in_flight"]) if await self._count(leave=leave) else None

        if why := await drained(ask, self._config.drain_timeout - LINGER_S):
            self._say(why)

    async def _start(self) -> None:
        """Start the engine; tell control, until it has heard, if that fails."""
        try:
            launch = await self._launch()
            begun = await asyncio.to_thread(adopt, headstart_socket(Settings().root, self._node), self._config.key)
            if begun:
                self._log = begun.log
            self._say(f"replica of {self._config.key}, on {socket.gethostname()}")
            try:
                await self._start_engine(launch, begun)
            except EngineError as error:
                spoilt = self._engine is not None and self._engine.forked and "fork" in str(error)
                if not self._engine or not (spoilt or self._engine.unexplained()):
                    raise
                self._say(f"{error}; tried once more")
                await self._engine.end()
                await self._start_engine(replace(launch, warm=None) if spoilt else launch)
            self._passed("ready")
            await self._count()
            self._max_model_len = await self._engine.max_model_len() if self._engine else 0
            self._state = "ready"
            await self._report()
        except Exception as error:
            if not isinstance(error, LLMRunError):
                log.exception("a replica of %s did not start", self._config.spec.name)
            self._failed = str(error) if isinstance(error, LLMRunError) else f"{type(error).__name__}: {error}"
            self._say(f"did not start: {self._failed}")
            while not await self._tell_control("failed", self._registration(), self._failed):
                await asyncio.sleep(REPORT_S)
            if self._engine:
                await self._engine.end()
            return
        with contextlib.suppress(ray.exceptions.RayError, ValueError):  # for the next replica; this one serves already
            agent = await asyncio.to_thread(agent_on, self._node)
            agent.warm.remote(self._config.spec.engine)

    async def _start_engine(self, launch: Launch, begun: Begun | None = None) -> None:
        """Start it, if it has not been begun, and wait until it answers. Raises EngineError."""
        engine = self._engine = EngineProcess(get_engine(self._config.spec.engine), launch, begun, self._bring_adapter)
        self._told = {}
        started = time.monotonic()
        await engine.start()
        self._moments["forked"] = engine.begun_at
        how = "forked from the warm parent" if engine.forked else "started"
        how += " ahead of this replica" if begun else ""
        self._say(f"engine {self._config.spec.engine} {how}, pid {engine.pid}")
        await engine.ready(self._config.start_timeout)
        self._say(f"engine ready after {time.monotonic() - started:.1f} s, port {engine.port}")

    async def _launch(self) -> Launch:
        """Everything the engine needs, brought to this node."""
        spec = self._config.spec
        environments = Environments(Settings().root, self._fetch_package)
        site = await environments.requirements(spec.requirements) if spec.requirements else None
        code = await environments.code(spec.code.package) if spec.code else None
        weights = await self._weights()
        self._passed("weights")
        member = Member(self._node, self._host, self._devices)
        make = functools.partial(make_launch, code=code, site=site, warm=await self._warm(), log=self._log)
        return await asyncio.to_thread(make, self._config, member, weights, self._where())

    async def _warm(self) -> Path | None:
        """The socket of this node's warm parent, which the node agent keeps; None where there is none."""
        engine = self._config.spec.engine
        if not Settings().warm_parent or not get_engine(engine).module:
            return None
        path = warm_socket(Settings().root, self._node, engine)
        if not listens(path):
            try:
                await asyncio.wait_for(agent_on(self._node).warm.remote(engine), AGENT_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                self._say(f"no warm parent: the node agent does not answer ({type(error).__name__})")
        return path

    async def _weights(self) -> Path:
        """The folder that the engine loads; the node agent brings it if it is not here. Raises LLMRunError."""
        folder = await asyncio.to_thread(find_weights, self._config, self._where())
        pin = self._config.pin
        if folder or not pin:
            assert folder
            return folder
        self._say(f"bringing the weights {pin.weights} ({pin.short}, {pin.total:,} bytes)")
        started = time.monotonic()
        brought = await _unwrapped(self._bring(pin))
        self._say(f"weights here after {time.monotonic() - started:.1f} s")
        return brought

    async def _bring(self, pin: Pin) -> Path:
        """The folder of a pin, which the node agent brings."""
        return Path(await agent_on(self._node).bring.remote(pin, self._config.spec.env))

    async def _bring_adapter(self, name: str, pin: str) -> Path:
        """The folder of an adapter, brought to this node. Raises LLMRunError."""
        try:
            found: Adapter = await _unwrapped(self._control.adapter.remote(self._config.spec.name, name, pin))
            return await _unwrapped(self._bring(found.pin)) / found.folder
        except ray.exceptions.RayTaskError:
            raise  # a fault, not an absence
        except ray.exceptions.RayError as error:
            raise EngineError(f"control or the node agent is away ({type(error).__name__}): ask again") from None

    async def _report_always(self) -> None:
        """Report every REPORT_S, from the start to the end; notice when the engine dies."""
        while not self._failed:
            engine = self._engine
            if self._state == "ready" and engine and not await self._count():
                if engine.ended():
                    self._failed = f"the engine died: {engine.cause()}"
                elif time.monotonic() - self._answered > SILENT_S:
                    self._failed = f"the engine has not answered for {SILENT_S:g} s"
                if self._failed:  # Serve replaces this replica at its next look (check_health)
                    self._say(self._failed)
                    await self._tell_control("gone", self._registration(), self._failed)
                    await engine.end()
                    return
            await self._report()
            await asyncio.sleep(REPORT_S)

    async def _count(self, *, leave: bool = False) -> bool:
        """Read the shim's counts (`leave`: which takes no more, if nothing is in flight); False without an answer."""
        try:
            if self._engine:
                self._counts = await (self._engine.leave() if leave else self._engine.state())
        except EngineError as error:
            self._say(str(error))
            return False
        self._answered = time.monotonic()
        return True

    async def _report(self) -> None:
        report = self._registration()
        if await self._tell_control("report", report):
            self._told |= {(row[0], row[1]): row for row in report.usage}

    async def _tell_control(self, method: str, *args: Any) -> bool:
        """Call control; False while it is away (its table comes back with the next report)."""
        try:
            await asyncio.wait_for(getattr(self._control, method).remote(*args), CONTROL_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("control is away: %s", type(error).__name__)
            return False
        return True

    async def _fetch_package(self, digest: str) -> bytes:
        package: bytes = await self._control.package.remote(digest)
        return package

    def _registration(self) -> Registration:
        engine = self._engine
        return Registration(
            id=self._id,
            model=self._config.spec.name,
            version=self._config.version,
            node=self._node,
            host=self._host,
            port=engine.port if engine else 0,
            link=engine.link if engine else 0,
            token=engine.token if engine else "",
            state=self._state,
            in_flight=self._counts.get("in_flight", 0),
            idle_s=self._counts.get("idle_s", 0),
            forked=engine.forked if engine else False,
            moments=self._moments,
            paths=frozenset(self._counts.get("paths", ())),
            max_model_len=self._max_model_len,
            adapters=frozenset(self._counts.get("adapters", ())),
            usage=tuple(row for row in map(tuple, self._counts.get("usage", ())) if self._told.get(row[:2]) != row),
        )

    def _passed(self, part: str) -> None:
        self._moments[part] = time.time()

    def _where(self) -> str:
        return f"node {self._host} ({socket.gethostname()})"

    def _say(self, text: str) -> None:
        try:
            with self._log.open("a") as file:
                file.write(f"[llmrun] {time.strftime('%H:%M:%S')} {text}\n")
        except OSError as error:  # a full disk must not end the replica
            log.warning("%s (its log cannot be written: %s)", text, error)


async def _unwrapped(call: Awaitable[T]) -> T:
    """An actor's answer. Raises its LLMRunError as it is, and RayError."""
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LLMRunError) else error) from None

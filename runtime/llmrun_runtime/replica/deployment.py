"""The Serve deployment: a thin actor that owns one engine process.

Starts the engine, registers it with control, renews that while it runs, and drains before it ends.
Imports no engine; Serve never sends it a request: bytes go from the ingress to the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from dataclasses import replace
from typing import Any

import ray

from llmrun.errors import EngineError, LLMRunError
from llmrun.settings import Settings
from llmrun.wire import ReplicaState
from llmrun_runtime.actors import control_handle
from llmrun_runtime.engines.base import Launch
from llmrun_runtime.engines.forkserver.prestart import adopt, prestart_socket
from llmrun_runtime.engines.process.engine_process import EngineProcess
from llmrun_runtime.engines.process.start import StartedProcess
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.logs import write_log
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.replica.drain import LINGER_S, SILENT_S, drained
from llmrun_runtime.replica.multinode import RemoteMembers, free_port
from llmrun_runtime.replica.provisioner import Provisioner
from llmrun_runtime.wire.replica_config import ReplicaConfig
from llmrun_runtime.wire.reports import REPORT_S, ReplicaReport
from llmrun_runtime.wire.usage import PaceRow, Row

log = logging.getLogger("ray.serve")
CONTROL_TIMEOUT_S = 10


class Replica:
    """One running copy of a model's version."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = ReplicaConfig.model_validate(config)
        self._control = control_handle()
        self._bringer = Provisioner(self._config, self._say, self._passed)
        self._log = self._bringer.log
        self._engine: EngineProcess | None = None
        self._others: RemoteMembers | None = None
        self._state: ReplicaState = "starting"
        self._counts: dict[str, Any] = {}
        self._told: dict[tuple[str, str], Row] = {}
        self._told_paces: dict[str, PaceRow] = {}
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
        await self._end_engine()
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
            socket_path = prestart_socket(Settings().root, self._bringer.node)
            begun = await asyncio.to_thread(adopt, socket_path, self._config.key)
            if begun:
                self._log = begun.log
            self._say(f"replica of {self._config.key}, on {socket.gethostname()}")
            try:
                await self._start_engine(launch, begun)
            except EngineError as error:
                spoilt = self._engine is not None and self._engine.forked and "fork" in str(error)
                if self._others or not self._engine or not (spoilt or self._engine.unexplained()):
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
            await self._end_engine()
            return
        with contextlib.suppress(ray.exceptions.RayError, ValueError):  # for the next replica; this one serves already
            agent = await asyncio.to_thread(agent_on, self._bringer.node)
            agent.warm.remote(self._config.spec.engine)
            if self._bringer.found:
                agent.found.remote()

    async def _start_engine(self, launch: Launch, begun: StartedProcess | None = None) -> None:
        """Start it, if it has not been begun, and wait until it answers. Raises EngineError."""
        kind = get_engine(self._config.spec.engine)
        engine = self._engine = EngineProcess(kind, launch, begun, self._bringer.adapter)
        self._told, self._told_paces = {}, {}
        started = time.monotonic()
        await engine.start()
        self._moments["forked"] = engine.begun_at
        how = "forked from the warm parent" if engine.forked else "started"
        how += " ahead of this replica" if begun else ""
        self._say(f"engine {self._config.spec.engine} {how}, pid {engine.pid}")
        if self._others:
            await self._others.start(launch.members, launch.port)
            await self._others.unless_failed(engine.ready(self._config.start_timeout))
        else:
            await engine.ready(self._config.start_timeout)
        self._say(f"engine ready after {time.monotonic() - started:.1f} s, port {engine.port}")

    async def _launch(self) -> Launch:
        """Everything the engine needs, brought to this node, and its other members placed. Raises LLMRunError."""
        mine = self._bringer.member()
        if self._config.spec.nodes == 1:
            return await self._bringer.launch((mine,))
        self._others = RemoteMembers(self._config)
        members = (mine, *await self._others.members())
        return await self._bringer.launch(members, port=free_port(mine.host))

    async def _end_engine(self) -> None:
        """End its process, and those of its other members."""
        if self._engine:
            await self._engine.end()
        if self._others:
            await self._others.end()

    async def _report_always(self) -> None:
        """Report every REPORT_S, from the start to the end; notice when the engine dies."""
        while not self._failed:
            engine = self._engine
            if self._state == "ready" and engine and not (await self._count() and not self._trouble()):
                if engine.ended() or self._trouble():
                    self._failed = f"the engine died: {self._trouble() or engine.cause()}"
                elif time.monotonic() - self._answered > SILENT_S:
                    self._failed = f"the engine has not answered for {SILENT_S:g} s"
                if self._failed:  # Serve replaces this replica at its next look (check_health)
                    self._say(self._failed)
                    await self._tell_control("gone", self._registration(), self._failed)
                    await self._end_engine()
                    return
            await self._report()
            await asyncio.sleep(REPORT_S)

    def _trouble(self) -> str:
        """Why a member of an engine that spans nodes has ended; "" if none has."""
        return self._others.trouble if self._others else ""

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
            self._told_paces |= {row[0]: row for row, _ in report.paces}

    async def _tell_control(self, method: str, *args: Any) -> bool:
        """Call control; False while it is away (its table comes back with the next report)."""
        try:
            await asyncio.wait_for(getattr(self._control, method).remote(*args), CONTROL_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            log.warning("control is away: %s", type(error).__name__)
            return False
        return True

    def _registration(self) -> ReplicaReport:
        engine = self._engine
        paces = [(row, self._told_paces.get(row[0])) for row in map(tuple, self._counts.get("paces", ()))]
        return ReplicaReport(
            id=self._bringer.actor,
            model=self._config.spec.name,
            version=self._config.version,
            node=self._bringer.node,
            host=self._bringer.host,
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
            paces=tuple((row, told) for row, told in paces if row != told),
        )

    def _passed(self, part: str) -> None:
        self._moments[part] = time.time()

    def _say(self, text: str) -> None:
        try:
            write_log(self._log, text)
        except OSError as error:  # a full disk must not end the replica
            log.warning("%s (its log cannot be written: %s)", text, error)

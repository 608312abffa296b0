"""The Serve deployment: a thin actor that owns one engine process.

Starts the engine, registers it with control, renews that while it runs, and drains before it ends.
Imports no engine; Serve never sends it a request: bytes go from the ingress to the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict

from llmrun.errors import EngineError, LLMRunError
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun.wire import ReplicaState
from llmrun_runtime.actors import control_handle
from llmrun_runtime.engines.base import Launch, Member, ShimConfig
from llmrun_runtime.engines.child import listens
from llmrun_runtime.engines.keeper import warm_socket
from llmrun_runtime.engines.kinds import get_engine
from llmrun_runtime.engines.process import EngineProcess
from llmrun_runtime.environments import Environments, environment
from llmrun_runtime.logs import log_path
from llmrun_runtime.node import agent_on
from llmrun_runtime.reports import REPORT_S, Registration
from llmrun_runtime.weights.cache import open_cache
from llmrun_runtime.weights.pin import Pin

log = logging.getLogger("ray.serve")
# An engine that answers nothing for so long is taken for dead.
SILENT_S = 120.0
DRAIN_POLL_S = 0.1
# The ingress hears of a deregistration through its long poll; for so long a request may still come by the old table.
LINGER_S = 1.0
CONTROL_TIMEOUT_S = 10
AGENT_TIMEOUT_S = 10
CACHE_DAYS = 30


class ReplicaConfig(BaseModel):
    """What a replica is told by control."""

    model_config = ConfigDict(frozen=True)
    spec: ModelSpec
    version: int
    pin: Pin | None
    start_timeout: float
    drain_timeout: float
    hook_timeout: float

    def to_dict(self) -> dict[str, Any]:
        """For the application's arguments."""
        return self.model_dump(mode="json")


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
        await self._report()
        if was_ready and not self._failed:
            now = time.monotonic
            deadline = now() + self._config.drain_timeout - LINGER_S
            quiet_since = now()
            while now() < deadline and now() - quiet_since < LINGER_S and self._engine and not self._engine.ended():
                if not await self._count() or self._counts["in_flight"]:  # no answer: busy
                    quiet_since = now()
                await asyncio.sleep(DRAIN_POLL_S)
        for task in (self._starting, self._reporting):
            task.cancel()
        await asyncio.gather(self._starting, self._reporting, return_exceptions=True)
        if self._engine:
            await self._engine.end()
        self._say("ended")
        await self._tell_control("gone", self._registration())

    async def _start(self) -> None:
        """Start the engine; tell control, until it has heard, if that fails."""
        try:
            launch = await self._launch()
            try:
                await self._start_engine(launch)
            except EngineError as error:
                spoilt = self._engine is not None and self._engine.forked and "fork" in str(error)
                if not self._engine or not (spoilt or self._engine.unexplained()):
                    raise
                self._say(f"{error}; tried once more")
                await self._engine.end()
                await self._start_engine(replace(launch, warm=None) if spoilt else launch)
            self._passed("ready")
            await self._count()
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

    async def _start_engine(self, launch: Launch) -> None:
        """Start it and wait until it answers. Raises EngineError."""
        engine = self._engine = EngineProcess(get_engine(self._config.spec.engine), launch)
        started = time.monotonic()
        await engine.start()
        self._passed("forked")
        how = "forked from the warm parent" if engine.forked else "started"
        self._say(f"engine {self._config.spec.engine} {how}, pid {engine.pid}")
        await engine.ready(self._config.start_timeout)
        self._say(f"engine ready after {time.monotonic() - started:.1f} s, port {engine.port}")

    async def _launch(self) -> Launch:
        """Everything the engine needs, brought to this node."""
        spec = self._config.spec
        self._say(f"replica of {spec.name}, version {self._config.version}, on {socket.gethostname()}")
        environments = Environments(Settings().root, self._fetch_package)
        site = await environments.requirements(spec.requirements) if spec.requirements else None
        shim = ShimConfig(model=spec.name, hook_timeout=self._config.hook_timeout)
        if spec.code:
            code = await environments.code(spec.code.package)
            shim = replace(shim, file=str(code / spec.code.file), cls=spec.code.cls, hooks=spec.code.hooks)
        weights = await self._weights()
        self._passed("weights")
        return Launch(
            names=spec.served_names,
            weights=str(weights),
            members=(Member(self._node, self._host, self._devices),),
            engine_args=spec.engine_args,
            python=sys.executable,
            env=engine_environment(spec, site, self._where()),
            shim=shim,
            log=self._log,
            cache=await asyncio.to_thread(engine_cache, Settings().root, spec.name, self._config.version),
            fast_start=spec.cold_start == "fast",
            warm=await self._warm(),
        )

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
        spec, pin = self._config.spec, self._config.pin
        if pin is None and not spec.path:
            raise EngineError(f"model={spec.model.source!r}: what it means was never pinned: deploy it again")
        if pin is None:
            path = Path(spec.path or "").expanduser()
            if not path.exists():
                raise EngineError(f"model={spec.model.source!r}: there is no such path on {self._where()}")
            return path
        cache = open_cache(Settings())
        if await asyncio.to_thread(cache.find, pin.id):
            cache.used(pin.id)
            return cache.folder(pin.id)
        self._say(f"bringing the weights {pin.weights} ({pin.short}, {pin.total:,} bytes)")
        started = time.monotonic()
        try:
            folder: str = await agent_on(self._node).bring.remote(pin, spec.env)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, LLMRunError) else error) from None
        self._say(f"weights here after {time.monotonic() - started:.1f} s")
        return Path(folder)

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

    async def _count(self) -> bool:
        """Read the shim's counts; False if the engine does not answer."""
        try:
            self._counts = await self._engine.state() if self._engine else {}
        except EngineError as error:
            self._say(str(error))
            return False
        self._answered = time.monotonic()
        return True

    async def _report(self) -> None:
        await self._tell_control("report", self._registration())

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
            token=engine.token if engine else "",
            state=self._state,
            in_flight=self._counts.get("in_flight", 0),
            idle_s=self._counts.get("idle_s", 0),
            forked=engine.forked if engine else False,
            moments=self._moments,
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


def engine_cache(root: Path, model: str, version: int) -> Path:
    """Where engines of that version keep what they may find again; those that CACHE_DAYS saw no start are removed."""
    folder = root / "cache" / "engines" / model
    mine = folder / f"v{version}"
    mine.mkdir(parents=True, exist_ok=True)
    os.utime(mine)
    for other in folder.parent.glob("*/v*"):
        with contextlib.suppress(FileNotFoundError):  # another replica was first
            if time.time() - other.stat().st_mtime > CACHE_DAYS * 86400:
                shutil.rmtree(other, ignore_errors=True)
    return mine


def engine_environment(spec: ModelSpec, site: Path | None, where: str) -> dict[str, str]:
    """The engine's variables: the node's own, then the spec's. Raises EngineError for a missing secret."""
    env = environment(spec.env, where)
    if site:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), env.get("PYTHONPATH")]))
    return env

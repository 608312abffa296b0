"""Provides what an actor needs on its node before an engine can start there: weights, code, requirements.

The node agent fetches the weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import ray

from llmrun.errors import ClusterError, EngineError, LLMRunError
from llmrun.settings import Settings
from llmrun_runtime.actors import ControlClient
from llmrun_runtime.engines.base import Launch, Member
from llmrun_runtime.engines.forkserver.supervisor import forkserver_socket
from llmrun_runtime.engines.process.unix_sockets import is_listening
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.logs import log_path
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.node.disk_space import lack_of_space
from llmrun_runtime.node.environments import Environments
from llmrun_runtime.node.launch import cached_weights, local_weights, make_launch
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.replica_config import ReplicaConfig

T = TypeVar("T")
AGENT_TIMEOUT_S = 10


class Provisioner:
    """The provisioner of one version of a model, on the current actor's node.

    `write_line` writes to the actor's log; `mark` records the time at which a part of the start is complete.
    """

    def __init__(self, config: ReplicaConfig, write_line: Callable[[str], None], mark: Callable[[str], None]) -> None:
        self._config = config
        self._write_line = write_line
        self._mark = mark
        self._control = ControlClient()
        context = ray.get_runtime_context()
        self.actor = context.get_actor_id()
        self.node = context.get_node_id()
        self.host = ray.util.get_node_ip_address()
        self.devices = tuple(context.get_accelerator_ids().get("GPU", ()))
        settings = Settings()
        self.log = log_path(settings.root, config.spec.name, config.version, self.actor)
        # `launch` reports what is wrong with the home; here, Serve would retry without a cause.
        with contextlib.suppress(OSError, ClusterError):
            settings.open_home()
            self.log.parent.mkdir(parents=True, exist_ok=True)
        self.weights_were_cached = False
        """Whether `launch` found the pin on this node."""

    def member(self) -> Member:
        """The engine's member on this actor's node."""
        return Member(self.node, self.host, self.devices)

    async def launch(self, members: tuple[Member, ...], member_rank: int = 0, port: int = 0) -> Launch:
        """Install everything that member `member_rank` needs; return its launch. Raises LLMRunError."""
        await asyncio.to_thread(Settings().open_home)
        if lack := await asyncio.to_thread(lack_of_space, Settings()):
            raise EngineError(f"{self.where()}: {lack}")
        await asyncio.to_thread(self.log.parent.mkdir, parents=True, exist_ok=True)
        spec = self._config.spec
        environments = Environments(Settings().root, self._fetch_package)
        site = await environments.install_requirements(spec.requirements) if spec.requirements else None
        code = await environments.install_code(spec.code.package) if spec.code else None
        weights = await self._weights()
        self._mark("weights")
        make = functools.partial(
            make_launch,
            code=code,
            site=site,
            forkserver=await self._forkserver() if member_rank == 0 else None,
            log=self.log,
            member_rank=member_rank,
            port=port,
        )
        return await asyncio.to_thread(make, self._config, members, weights, self.where())

    async def adapter(self, name: str, pin: str) -> Path:
        """Fetch an adapter to this node; return its folder. Raises LLMRunError."""
        try:
            adapter: Adapter = await _unwrapped(self._control.call("adapter", self._config.spec.name, name, pin))
            return await _unwrapped(self._fetch(adapter.pin)) / adapter.folder
        except ray.exceptions.RayTaskError:
            raise  # a bug, not an unreachable actor
        except ray.exceptions.RayError as error:
            raise EngineError(f"control or the node agent is unavailable ({type(error).__name__}): retry") from None

    def where(self) -> str:
        """This node, for messages."""
        return f"node {self.host} ({socket.gethostname()})"

    async def _forkserver(self) -> Path | None:
        """The socket of this node's fork server, which the node agent starts; None if the engine has none."""
        engine = self._config.spec.engine
        if not Settings().forkserver or not get_engine(engine).module:
            return None
        path = forkserver_socket(Settings().root, self.node, engine)
        if not is_listening(path):
            try:
                await asyncio.wait_for(agent_on(self.node).warm.remote(engine), AGENT_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                self._write_line(f"no fork server: the node agent does not respond ({type(error).__name__})")
        return path

    async def _weights(self) -> Path:
        """The folder that the engine loads, which the node agent fetches if necessary. Raises LLMRunError."""
        pin = self._config.pin
        if not pin:
            return await asyncio.to_thread(local_weights, self._config.spec, self.where())
        if cached := await asyncio.to_thread(cached_weights, pin):
            self.weights_were_cached = True
            return cached
        self._write_line(f"fetching the weights {pin.weights} ({pin.short}, {pin.total:,} bytes)")
        started = time.monotonic()
        fetched = await _unwrapped(self._fetch(pin))
        self._write_line(f"fetched the weights in {time.monotonic() - started:.1f} s")
        return fetched

    async def _fetch(self, pin: Pin) -> Path:
        """Have the node agent fetch a pin; return its folder."""
        return Path(await agent_on(self.node).fetch.remote(pin, self._config.spec.env))

    async def _fetch_package(self, digest: str) -> bytes:
        package: bytes = await self._control.call("package", digest)
        return package


async def _unwrapped(call: Awaitable[T]) -> T:
    """An actor's reply. Raises the actor's LLMRunError itself instead of Ray's wrapper; otherwise RayError."""
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        cause: Any = error.cause
        raise (cause if isinstance(cause, LLMRunError) else error) from None

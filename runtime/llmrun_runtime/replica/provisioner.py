"""What an actor of ours has to bring to its node before an engine can start there: weights, code, packages.

The node agent does the work; control says what is wanted.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import ray

from llmrun.errors import EngineError, LLMRunError
from llmrun.settings import Settings
from llmrun_runtime.actors import control_handle
from llmrun_runtime.engines.base import Launch, Member
from llmrun_runtime.engines.forkserver.supervisor import forkserver_socket
from llmrun_runtime.engines.process.unix_sockets import listens
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.logs import log_path
from llmrun_runtime.node.agent import agent_on
from llmrun_runtime.node.environments import Environments
from llmrun_runtime.node.launch import find_weights, make_launch
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.replica_config import ReplicaConfig

T = TypeVar("T")
AGENT_TIMEOUT_S = 10


class Provisioner:
    """Of one version of a model, on the node of the actor that makes it; `say` writes to that actor's log."""

    def __init__(self, config: ReplicaConfig, say: Callable[[str], None], passed: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._passed = passed
        self._control = control_handle()
        context = ray.get_runtime_context()
        self.actor = context.get_actor_id()
        self.node = context.get_node_id()
        self.host = ray.util.get_node_ip_address()
        self.devices = tuple(context.get_accelerator_ids().get("GPU", ()))
        self.log = log_path(Settings().root, config.spec.name, config.version, self.actor)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.found = False
        """Whether the weights lay here."""

    def member(self, rank: int = 0) -> Member:
        """This actor's place, as a member of an engine."""
        return Member(self.node, self.host, self.devices, rank)

    async def launch(self, members: tuple[Member, ...], rank: int = 0, port: int = 0) -> Launch:
        """Everything the engine's member of that rank needs, brought here. Raises LLMRunError."""
        spec = self._config.spec
        environments = Environments(Settings().root, self._fetch_package)
        site = await environments.requirements(spec.requirements) if spec.requirements else None
        code = await environments.code(spec.code.package) if spec.code else None
        weights = await self._weights()
        self._passed("weights")
        warm = await self._warm() if rank == 0 else None
        make = functools.partial(make_launch, code=code, site=site, warm=warm, log=self.log, rank=rank, port=port)
        return await asyncio.to_thread(make, self._config, members, weights, self.where())

    async def adapter(self, name: str, pin: str) -> Path:
        """The folder of an adapter, brought to this node. Raises LLMRunError."""
        try:
            found: Adapter = await _unwrapped(self._control.adapter.remote(self._config.spec.name, name, pin))
            return await _unwrapped(self._bring(found.pin)) / found.folder
        except ray.exceptions.RayTaskError:
            raise  # a fault, not an absence
        except ray.exceptions.RayError as error:
            raise EngineError(f"control or the node agent is away ({type(error).__name__}): ask again") from None

    def where(self) -> str:
        """This node, for a person."""
        return f"node {self.host} ({socket.gethostname()})"

    async def _warm(self) -> Path | None:
        """The socket of this node's warm parent, which the node agent keeps; None where there is none."""
        engine = self._config.spec.engine
        if not Settings().forkserver or not get_engine(engine).module:
            return None
        path = forkserver_socket(Settings().root, self.node, engine)
        if not listens(path):
            try:
                await asyncio.wait_for(agent_on(self.node).warm.remote(engine), AGENT_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                self._say(f"no warm parent: the node agent does not answer ({type(error).__name__})")
        return path

    async def _weights(self) -> Path:
        """The folder that the engine loads; the node agent brings it if it is not here. Raises LLMRunError."""
        folder = await asyncio.to_thread(find_weights, self._config, self.where())
        pin = self._config.pin
        self.found = folder is not None and pin is not None
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
        return Path(await agent_on(self.node).bring.remote(pin, self._config.spec.env))

    async def _fetch_package(self, digest: str) -> bytes:
        package: bytes = await self._control.package.remote(digest)
        return package


async def _unwrapped(call: Awaitable[T]) -> T:
    """An actor's answer. Raises its LLMRunError as it is, and RayError."""
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        cause: Any = error.cause
        raise (cause if isinstance(cause, LLMRunError) else error) from None

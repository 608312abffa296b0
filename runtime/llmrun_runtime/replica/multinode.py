"""An engine that spans nodes: its members beside the first, each held by an actor of its own on its node.

The replica makes these actors in the places of its group; they are its own, so Ray ends them when it dies, and each
one's part of the engine holds a lease on its actor.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llmrun.errors import EngineError, LLMRunError
from llmrun_runtime.engines.base import Member
from llmrun_runtime.engines.process.engine_process import EngineProcess
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.logs import write_log
from llmrun_runtime.replica.provisioner import Provisioner
from llmrun_runtime.wire.replica_config import ReplicaConfig

log = logging.getLogger("ray.serve")
# Its place is kept free for it; what takes time is a new worker of Ray's.
PLACE_TIMEOUT_S = 60
END_TIMEOUT_S = 30
POLL_S = 0.2


class MemberActor:
    """The actor: one member of an engine, of rank 1 or more."""

    def __init__(self, config: dict[str, Any], rank: int) -> None:
        self._config = ReplicaConfig.model_validate(config)
        self._rank = rank
        self._bringer = Provisioner(self._config, self._say, lambda part: None)
        self._engine: EngineProcess | None = None

    async def member(self) -> Member:
        """Where it is, with which devices."""
        return self._bringer.member(self._rank)

    async def start(self, members: tuple[Member, ...], port: int) -> None:
        """Start the process. Raises LLMRunError."""
        launch = await self._bringer.launch(members, self._rank, port)
        self._engine = EngineProcess(get_engine(self._config.spec.engine), launch)
        await self._engine.start()
        self._say(f"member {self._rank} of {self._config.key} started, pid {self._engine.pid}")

    async def ended(self) -> str:
        """Return why, once the process has ended."""
        while self._engine and not self._engine.ended():
            await asyncio.sleep(POLL_S)
        return self._engine.cause() if self._engine else "it was never started"

    async def end(self) -> None:
        """End the process."""
        if self._engine:
            await self._engine.end()
            self._say("ended")

    def _say(self, text: str) -> None:
        try:
            write_log(self._bringer.log, text)
        except OSError as error:  # a full disk must not end the engine
            log.warning("%s (its log cannot be written: %s)", text, error)


class RemoteMembers:
    """All members of an engine but the first, as its replica has them."""

    def __init__(self, config: ReplicaConfig) -> None:
        group = ray.util.get_current_placement_group()
        assert group
        self._actors = []
        for rank, bundle in enumerate(group.bundle_specs[1:], 1):
            rest = dict(bundle)
            options = {"num_cpus": rest.pop("CPU", 0), "num_gpus": rest.pop("GPU", 0), "resources": rest}
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            actor = ray.remote(MemberActor).options(**options, scheduling_strategy=place)
            self._actors.append(actor.remote(config.to_dict(), rank))
        self._watching: list[asyncio.Task[None]] = []
        self._failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def members(self) -> tuple[Member, ...]:
        """Their places, in the order of their ranks. Raises EngineError."""
        try:
            async with asyncio.timeout(PLACE_TIMEOUT_S):
                return tuple(await asyncio.gather(*(actor.member.remote() for actor in self._actors)))
        except (ray.exceptions.RayError, TimeoutError) as error:
            text = f"the engine's other members were not placed within {PLACE_TIMEOUT_S} s ({type(error).__name__})"
            raise EngineError(text) from None

    async def start(self, members: tuple[Member, ...], port: int) -> None:
        """Start all of them, and watch them. Raises LLMRunError."""
        try:
            await asyncio.gather(*(actor.start.remote(members, port) for actor in self._actors))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, LLMRunError) else error) from None
        except ray.exceptions.RayError as error:
            raise EngineError(f"a member of the engine went away: {type(error).__name__}") from None
        pairs = zip(self._actors, members[1:], strict=True)
        self._watching = [asyncio.get_running_loop().create_task(self._watch(*pair)) for pair in pairs]

    async def _watch(self, actor: Any, member: Member) -> None:
        try:
            why = await actor.ended.remote()
        except ray.exceptions.RayError as error:
            why = f"its actor is gone ({type(error).__name__})"
        if not self._failed.done():
            self._failed.set_result(f"its member on node {member.host} ended: {why}")

    @property
    def trouble(self) -> str:
        """Why one of them has ended; "" while all run."""
        return self._failed.result() if self._failed.done() else ""

    async def unless_failed(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`. Raises EngineError if one of them ends meanwhile."""
        task = asyncio.ensure_future(work)
        waited: set[asyncio.Future[Any]] = {task, self._failed}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineError(self.trouble)
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def end(self) -> None:
        """End their processes, and then them."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        ending = [actor.end.remote() for actor in self._actors]
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await asyncio.gather(*ending)
        except (ray.exceptions.RayError, TimeoutError) as error:  # what is left ends by its lease
            log.warning("a member of the engine did not end: %s", type(error).__name__)
        for actor in self._actors:
            ray.kill(actor)


def free_port(host: str) -> int:
    """A port there where the members of an engine can meet."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        return int(sock.getsockname()[1])

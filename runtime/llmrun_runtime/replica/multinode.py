"""The members of a multi-node engine after member 0; each member's process belongs to an actor on its node.

The replica creates these actors in the bundles of its placement group. It owns them, so Ray ends them when the replica
dies, and each member's processes hold a lease on their actor.
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
from llmrun_runtime.niceness import run_at_normal_priority
from llmrun_runtime.replica.provisioner import Provisioner
from llmrun_runtime.wire.replica_config import ReplicaConfig

log = logging.getLogger("ray.serve")
# The bundles are reserved, so the time goes into starting a Ray worker.
PLACEMENT_TIMEOUT_S = 60
END_TIMEOUT_S = 30
POLL_S = 0.2


class MemberActor:
    """The actor of one member of an engine, with member rank 1 or higher."""

    def __init__(self, config: dict[str, Any], member_rank: int) -> None:
        run_at_normal_priority()
        self._config = ReplicaConfig.model_validate(config)
        self._member_rank = member_rank
        self._provisioner = Provisioner(self._config, self._write_line, lambda part: None)
        self._engine: EngineProcess | None = None

    async def member(self) -> Member:
        """The member's node and devices."""
        return self._provisioner.member()

    async def start(self, members: tuple[Member, ...], port: int) -> None:
        """Start the member's process. Raises LLMRunError."""
        launch = await self._provisioner.launch(members, self._member_rank, port)
        self._engine = EngineProcess(get_engine(self._config.spec.engine), launch)
        await self._engine.start()
        self._write_line(f"member {self._member_rank} of {self._config.key} started, pid {self._engine.pid}")

    async def ended(self) -> str:
        """Wait until the process has exited; return the cause."""
        while self._engine and not self._engine.ended():
            await asyncio.sleep(POLL_S)
        return self._engine.cause() if self._engine else "it was never started"

    async def end(self) -> None:
        """Stop the process."""
        if self._engine:
            await self._engine.end()
            self._write_line("stopped")

    def _write_line(self, text: str) -> None:
        try:
            write_log(self._provisioner.log, text)
        except OSError as error:  # a full disk must not stop the engine
            log.warning("%s (cannot write its log: %s)", text, error)


class RemoteMembers:
    """All members of an engine but member 0, as seen by the replica. Must be created inside the replica's actor."""

    def __init__(self, config: ReplicaConfig) -> None:
        group = ray.util.get_current_placement_group()
        if group is None:
            raise EngineError("the replica of a multi-node engine has no placement group")
        self._actors = []
        for member_rank, bundle in enumerate(group.bundle_specs[1:], 1):
            resources = dict(bundle)
            options = {"num_cpus": resources.pop("CPU", 0), "num_gpus": resources.pop("GPU", 0), "resources": resources}
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=member_rank)
            actor = ray.remote(MemberActor).options(**options, scheduling_strategy=strategy)
            self._actors.append(actor.remote(config.to_dict(), member_rank))
        self._watchers: list[asyncio.Task[None]] = []
        self._failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def members(self) -> tuple[Member, ...]:
        """The members, ordered by member rank. Raises EngineError."""
        try:
            async with asyncio.timeout(PLACEMENT_TIMEOUT_S):
                return tuple(await asyncio.gather(*(actor.member.remote() for actor in self._actors)))
        except (ray.exceptions.RayError, TimeoutError) as error:
            text = f"the engine's other members were not placed within {PLACEMENT_TIMEOUT_S} s ({type(error).__name__})"
            raise EngineError(text) from None

    async def start(self, members: tuple[Member, ...], port: int) -> None:
        """Start the members' processes and watch them. `members` includes member 0. Raises LLMRunError."""
        try:
            await asyncio.gather(*(actor.start.remote(members, port) for actor in self._actors))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, LLMRunError) else error) from None
        except ray.exceptions.RayError as error:
            raise EngineError(f"a member of the engine is unavailable: {type(error).__name__}") from None
        pairs = zip(self._actors, members[1:], strict=True)
        self._watchers = [asyncio.get_running_loop().create_task(self._watch(*pair)) for pair in pairs]

    async def _watch(self, actor: Any, member: Member) -> None:
        try:
            cause = await actor.ended.remote()
        except ray.exceptions.RayError as error:
            cause = f"its actor died ({type(error).__name__})"
        if not self._failed.done():
            self._failed.set_result(f"its member on node {member.host} ended: {cause}")

    @property
    def failure(self) -> str:
        """Why a member has ended; "" while all run."""
        return self._failed.result() if self._failed.done() else ""

    async def unless_failed(self, work: Coroutine[Any, Any, None]) -> None:
        """Await `work`. Raises EngineError if a member ends first; `work` is then cancelled."""
        task = asyncio.ensure_future(work)
        futures: set[asyncio.Future[Any]] = {task, self._failed}
        try:
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineError(self.failure)
            task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def end(self) -> None:
        """Stop the members' processes, then their actors."""
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        ending = [actor.end.remote() for actor in self._actors]
        try:
            async with asyncio.timeout(END_TIMEOUT_S):
                await asyncio.gather(*ending)
        except (ray.exceptions.RayError, TimeoutError) as error:  # remaining processes end with their lease
            log.warning("a member of the engine did not stop: %s", type(error).__name__)
        for actor in self._actors:
            ray.kill(actor)


def free_port(host: str) -> int:
    """A free port on `host` for the engine's members to connect to."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        return int(sock.getsockname()[1])

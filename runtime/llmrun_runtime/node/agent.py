"""The node agent: one actor per node that installs code and weights there, starts engines early, and reads logs."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import socket
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmrun.errors import EngineError
from llmrun.settings import Settings
from llmrun.spec import ModelSpec, Secret
from llmrun.weights import Weights
from llmrun.wire import WeightsRow
from llmrun_runtime.actors import NAMESPACE, ControlClient
from llmrun_runtime.engines.base import Member
from llmrun_runtime.engines.forkserver.prestart import Prestarts, prestart_socket
from llmrun_runtime.engines.forkserver.supervisor import ForkServerSupervisor, forkserver_socket
from llmrun_runtime.engines.process.temp_dir import sweep_temp_dirs
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.logs import log_path, read_logs, remove_logs, trim_periodically
from llmrun_runtime.niceness import run_at_normal_priority
from llmrun_runtime.node.disk_space import Disk, lack_of_space, measure_disks
from llmrun_runtime.node.environments import Environments
from llmrun_runtime.node.launch import find_weights, make_launch
from llmrun_runtime.node.spare_worker import keep_spare_worker
from llmrun_runtime.node.variables import engine_env, worker_env
from llmrun_runtime.weights.adapters import AdapterListing
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.weights.node_weights import CacheInfo, NodeWeights
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.replica_config import ReplicaConfig

log = logging.getLogger("llmrun")
REMOVE_UNUSED_S = 3600.0
CONTROL_TIMEOUT_S = 30.0


class NodeAgent:
    """A node's API for control and for replicas. Failures are LLMRunErrors that name the node."""

    async def __init__(self) -> None:  # type: ignore[misc] # Ray awaits it
        run_at_normal_priority()
        settings = Settings()
        settings.open_home()
        self._root = settings.root
        self._host = ray.util.get_node_ip_address()
        self._node = ray.get_runtime_context().get_node_id()
        self._control = ControlClient()
        self._weights = NodeWeights(settings, self._host)
        self._environments = Environments(self._root, self._fetch_package, hold=False)
        self._supervisors: dict[str, ForkServerSupervisor] = {}
        self._spare_worker: asyncio.Task[None] | None = None
        self._prestarts: Prestarts | None = None
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(task) for task in (trim_periodically(self._root), self._remove_periodically())]

    async def _remove_periodically(self) -> None:
        """Remove every REMOVE_UNUSED_S what `remove_unused` removes. Never returns."""
        while True:
            await asyncio.sleep(REMOVE_UNUSED_S)
            try:
                await self.remove_unused(time.time())
            except (ray.exceptions.RayError, OSError, TimeoutError) as error:
                log.warning("cannot remove unused code from node %s, retrying: %s", self._host, error)

    async def remove_unused(self, now: float) -> None:
        """Remove code and requirements that no stored version uses, and logs of deleted models. `now` is Unix time.

        Raises RayError or TimeoutError if control is not reachable, and OSError.
        """
        used = await self._control.call("used_on_nodes", timeout=CONTROL_TIMEOUT_S)
        for folder in await self._environments.remove_unused(used.packages, used.requirements, now):
            log.info("removed %s: no version uses it", folder)
        await asyncio.to_thread(remove_logs, self._root, used.models, now)

    async def warm(self, engine_name: str) -> None:
        """Prepare for the next replica: start a spare worker, and the engine's fork server if it supports one.

        Removes temporary files of killed replicas. The fork server's socket accepts requests when this returns.
        """
        await asyncio.to_thread(sweep_temp_dirs)
        engine = get_engine(engine_name)
        if self._spare_worker is None or self._spare_worker.done():
            self._spare_worker = asyncio.get_running_loop().create_task(keep_spare_worker())
        if not engine.module or not Settings().forkserver:
            return
        if engine_name not in self._supervisors:
            path = forkserver_socket(self._root, self._node, engine_name)
            output = self._root / "logs" / f"warm-{engine_name}.log"
            self._supervisors[engine_name] = ForkServerSupervisor(engine, path, output, engine_env({}, self._where()))
        self._supervisors[engine_name].start()

    async def expect_replica(self) -> None:
        """Start a worker now: Ray places a replica here as soon as another one has ended."""
        await keep_spare_worker(delay=0)

    async def prestart(self, config: dict[str, Any]) -> None:
        """Start the engine of a replica before Ray has placed the replica here.

        Does nothing if the weights are not on this node or the engine cannot be forked. For engines on CPU only: the
        replica's devices are not assigned yet.
        """
        replica = ReplicaConfig.model_validate(config)
        spec, engine = replica.spec, get_engine(replica.spec.engine)
        if spec.requirements or not engine.module or not Settings().forkserver:
            return
        await self.warm(spec.engine)
        weights = await asyncio.to_thread(find_weights, replica, self._where())
        if not weights:
            return
        make = functools.partial(
            make_launch,
            code=await self._environments.install_code(spec.code.package) if spec.code else None,
            site=None,
            forkserver=forkserver_socket(self._root, self._node, spec.engine),
            log=log_path(self._root, spec.name, replica.version, secrets.token_hex(6)),
        )
        launch = await asyncio.to_thread(make, replica, (Member(self._node, self._host),), weights, self._where())
        self._prestarts = self._prestarts or Prestarts(prestart_socket(self._root, self._node))
        self._prestarts.start(replica.key, engine, launch)

    async def install(self, spec: ModelSpec) -> None:
        """Install the model's code and requirements. Raises EngineError, also if the node's disk is full."""
        if lack := await asyncio.to_thread(lack_of_space, Settings()):
            raise EngineError(lack)
        if spec.code:
            await self._environments.install_code(spec.code.package)
        if spec.requirements:
            await self._environments.install_requirements(spec.requirements)

    async def disks(self) -> list[Disk]:
        """See `measure_disks`."""
        return await asyncio.to_thread(measure_disks, Settings())

    async def logs(self, model: str, offsets: dict[str, int], tail: int) -> dict[str, tuple[int, str]]:
        """See `read_logs`."""
        return await asyncio.to_thread(read_logs, self._root, model, offsets, tail)

    async def pin(self, weights: Weights, env: Mapping[str, Secret | str]) -> Pin:
        """The source's current revision."""
        return await self._weights.pin(weights, self._worker_env(env))

    async def list_adapters(
        self,
        weights: Weights,
        env: Mapping[str, Secret | str],
        ranks: dict[str, int] | None,
        known: str = "",
        published: bool = False,
    ) -> AdapterListing:
        """See `NodeWeights.list_adapters`."""
        return await self._weights.list_adapters(weights, self._worker_env(env), ranks, known, published)

    async def last_import(self, weights: Weights) -> tuple[float, Pin] | None:
        """See `NodeWeights.last_import`."""
        return await self._weights.last_import(weights)

    async def fetch(self, pin: Pin, env: Mapping[str, Secret | str]) -> str:
        """Fetch the pin, from another node if one has it, else from its source; return the folder."""
        if await self._weights.has_pin(pin.id):
            peers, keep = [], []
        else:
            peers, keep = await self._control.call("weights_elsewhere", pin.id, self._node)
        return str(await self._weights.fetch(pin, self._worker_env(env), peers, keep))

    async def has_pin(self, pin_id: str) -> bool:
        """Whether the pin is complete on this node."""
        return await self._weights.has_pin(pin_id)

    async def serve_peers(self) -> Peer:
        """See `NodeWeights.serve_peers`."""
        return await self._weights.serve_peers()

    async def progress(self, key: str) -> tuple[int, int]:
        """Bytes done and total bytes of the running task for a pin."""
        return self._weights.progress(key)

    async def cache_info(self) -> CacheInfo:
        """See `NodeWeights.cache_info`."""
        return await self._weights.cache_info()

    async def count_cache_hit(self) -> None:
        """Count a replica that found its weights on this node."""
        self._weights.count_cache_hit()

    async def list_weights(self) -> list[WeightsRow]:
        """The weights on this node."""
        return await self._weights.list_weights()

    async def import_folder(self, folder: str, weights: Weights, keep: list[str]) -> Pin | None:
        """Import a folder of this node; None if it does not exist."""
        return await self._weights.import_folder(folder, weights, keep, self._worker_env({}))

    async def mirror(self, pin: Pin, target: Weights) -> dict[str, int]:
        """Upload a pin of this node."""
        return await self._weights.mirror(pin, target, self._worker_env({}))

    async def push_adapter(self, folder: str, target: Weights, env: Mapping[str, Secret | str]) -> None:
        """Copy an adapter from a folder of this node to an object store or to another folder."""
        await self._weights.push_adapter(folder, target, self._worker_env(env))

    async def verify(self, pin_ids: list[str]) -> dict[str, list[str]]:
        """Hash the files of these pins again; return the problems by pin."""
        return await self._weights.verify(pin_ids, self._worker_env({}))

    async def remove(self, pin_ids: list[str]) -> int:
        """Remove these pins; return the bytes freed."""
        return await self._weights.remove(pin_ids)

    async def prune(self, keep: list[str]) -> int:
        """Remove all pins but `keep`, and remains of interrupted downloads; return the bytes freed."""
        return await self._weights.prune(keep)

    def _worker_env(self, env: Mapping[str, Secret | str]) -> dict[str, str]:
        """The variables of a weights worker. Raises EngineError for a missing secret."""
        return worker_env(env, self._where())

    async def _fetch_package(self, digest: str) -> bytes:
        package: bytes = await self._control.call("package", digest)
        return package

    def _where(self) -> str:
        return f"node {self._host} ({socket.gethostname()})"


def agent_name(node_id: str) -> str:
    """The actor name of a node's agent."""
    return f"node-{node_id}"


class NoAgent(EngineError):
    """No agent runs on a node."""


def agent_of(node_id: str) -> Any:
    """A handle to the node's agent. Raises NoAgent if it is not running."""
    try:
        return ray.get_actor(agent_name(node_id), namespace=NAMESPACE)
    except ValueError:
        raise NoAgent(f"no agent runs on node {node_id[:12]}") from None


def agent_on(node_id: str) -> Any:
    """A handle to the node's agent, which is started if necessary. An autoscaler keeps a node that has an agent."""
    return (
        ray.remote(NodeAgent)
        .options(
            name=agent_name(node_id),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote()
    )

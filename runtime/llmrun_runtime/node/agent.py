"""The node agent: one actor per node that brings there what models need, and reads the logs that lie there."""

from __future__ import annotations

import asyncio
import functools
import secrets
import socket
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmrun.settings import Settings
from llmrun.spec import ModelSpec, Secret
from llmrun.weights import Weights
from llmrun.wire import WeightsRow
from llmrun_runtime.actors import NAMESPACE, control_handle
from llmrun_runtime.engines.base import Member
from llmrun_runtime.engines.forkserver.prestart import Prestarts, prestart_socket
from llmrun_runtime.engines.forkserver.supervisor import ForkServerSupervisor, forkserver_socket
from llmrun_runtime.engines.process.temp_dir import sweep_temp_dirs
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.logs import log_path, read_logs
from llmrun_runtime.node.environments import Environments, environment, worker_environment
from llmrun_runtime.node.launch import find_weights, make_launch
from llmrun_runtime.node.spare_worker import keep_spare
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.weights.node_weights import CacheInfo, NodeWeights
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.replica_config import ReplicaConfig


class NodeAgent:
    """What control and replicas can ask of a node. What goes wrong is an LLMRunError that names the node."""

    def __init__(self) -> None:
        settings = Settings()
        self._root = settings.root
        self._host = ray.util.get_node_ip_address()
        self._node = ray.get_runtime_context().get_node_id()
        self._control = control = control_handle()
        self._weights = NodeWeights(settings, self._host)

        async def fetch(digest: str) -> bytes:
            package: bytes = await control.package.remote(digest)
            return package

        self._environments = Environments(self._root, fetch)
        self._keepers: dict[str, ForkServerSupervisor] = {}
        self._spare: asyncio.Task[None] | None = None
        self._heads: Prestarts | None = None

    async def warm(self, engine: str) -> None:
        """Be ready for the next replica: keep a spare worker, and a warm parent of its engine, if one is of use.

        Replicas can ask the parent when this returns. What killed replicas left here is removed.
        """
        await asyncio.to_thread(sweep_temp_dirs)
        kind = get_engine(engine)
        if self._spare is None or self._spare.done():
            self._spare = asyncio.get_running_loop().create_task(keep_spare())
        if not kind.module or not Settings().forkserver:
            return
        if engine not in self._keepers:
            path = forkserver_socket(self._root, self._node, engine)
            output = self._root / "logs" / f"warm-{engine}.log"
            self._keepers[engine] = ForkServerSupervisor(kind, path, output, environment({}, self._where()))
        self._keepers[engine].start()

    async def prestart(self, config: dict[str, Any]) -> None:
        """Begin the engine of a replica that is on its way here, if its weights and code are here and it can be forked.

        For engines on CPU: of devices only the replica knows which it gets.
        """
        version = ReplicaConfig.model_validate(config)
        spec, kind = version.spec, get_engine(version.spec.engine)
        if spec.requirements or not kind.module or not Settings().forkserver:
            return
        await self.warm(spec.engine)
        weights = await asyncio.to_thread(find_weights, version, self._where())
        if not weights:
            return
        make = functools.partial(
            make_launch,
            code=await self._environments.code(spec.code.package) if spec.code else None,
            site=None,
            warm=forkserver_socket(self._root, self._node, spec.engine),
            log=log_path(self._root, spec.name, version.version, secrets.token_hex(6)),
        )
        launch = await asyncio.to_thread(make, version, (Member(self._node, self._host),), weights, self._where())
        self._heads = self._heads or Prestarts(prestart_socket(self._root, self._node))
        self._heads.start(version.key, kind, launch)

    async def prepare(self, spec: ModelSpec) -> None:
        """Bring the model's code and requirements here. Raises EngineError."""
        if spec.code:
            await self._environments.code(spec.code.package)
        if spec.requirements:
            await self._environments.requirements(spec.requirements)

    async def logs(self, model: str, offsets: dict[str, int], tail: int) -> dict[str, tuple[int, str]]:
        """See `read_logs`."""
        return read_logs(self._root, model, offsets, tail)

    async def pin(self, weights: Weights, env: Mapping[str, Secret | str]) -> Pin:
        """What a source means now."""
        return await self._weights.pin(weights, self._environment(env))

    async def adapters(
        self, weights: Weights, env: Mapping[str, Secret | str], ranks: dict[str, int] | None
    ) -> list[Adapter]:
        """See `NodeWeights.adapters`."""
        return await self._weights.adapters(weights, self._environment(env), ranks)

    async def imported(self, weights: Weights) -> tuple[float, Pin] | None:
        """See `NodeWeights.imported`."""
        return self._weights.imported(weights)

    async def bring(self, pin: Pin, env: Mapping[str, Secret | str]) -> str:
        """The folder of the complete pin, from another node if one has it, else from the store."""
        if await self._weights.has(pin.id):
            peers, keep = [], []
        else:
            peers, keep = await self._control.weights_elsewhere.remote(pin.id, self._node)
        return str(await self._weights.bring(pin, self._environment(env), peers, keep))

    async def has(self, pin_id: str) -> bool:
        """Whether a pin is complete here."""
        return await self._weights.has(pin_id)

    async def peer(self) -> Peer:
        """How other nodes reach the weights that lie here."""
        return await self._weights.peer()

    async def progress(self, key: str) -> tuple[int, int]:
        """Bytes here and in all, of what is under way for a pin."""
        return self._weights.progress(key)

    async def cache_facts(self) -> CacheInfo:
        """See `NodeWeights.cache_facts`."""
        return await self._weights.cache_facts()

    async def found(self) -> None:
        """A replica that has started found its weights here."""
        self._weights.found()

    async def rows(self) -> list[WeightsRow]:
        """The weights that lie here."""
        return self._weights.rows()

    async def take(self, folder: str, weights: Weights, keep: list[str]) -> Pin | None:
        """Import a folder of this node; None if it is not here."""
        return await self._weights.take(folder, weights, keep, self._environment({}))

    async def mirror(self, pin: Pin, target: Weights) -> dict[str, int]:
        """Upload a pin that lies here."""
        return await self._weights.mirror(pin, target, self._environment({}))

    async def push(self, folder: str, target: Weights, env: Mapping[str, Secret | str]) -> None:
        """Copy an adapter from a folder of this node to a store, or to another folder."""
        await self._weights.push(folder, target, self._environment(env))

    async def verify(self, pin_ids: list[str]) -> dict[str, list[str]]:
        """Hash the files of those pins that lie here again; what is wrong, by pin."""
        return await self._weights.verify(pin_ids, self._environment({}))

    async def remove(self, pin_ids: list[str]) -> int:
        """Remove those pins; the bytes freed."""
        return await self._weights.remove(pin_ids)

    async def prune(self, keep: list[str]) -> int:
        """Remove all that is not in `keep`, and what broken-off downloads left; the bytes freed."""
        return await self._weights.prune(keep)

    def _environment(self, env: Mapping[str, Secret | str]) -> dict[str, str]:
        """For a worker: the node's variables with the spec's, and llmrun's own settings."""
        return worker_environment(env, self._where())

    def _where(self) -> str:
        return f"node {self._host} ({socket.gethostname()})"


def agent_name(node_id: str) -> str:
    """What a node's agent is called."""
    return f"node-{node_id}"


def agent_on(node_id: str) -> Any:
    """A handle to the node's agent, started if there is none."""
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

"""The node agent: one actor per node that brings there what models need, and reads the logs that lie there."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun_runtime.actors import NAMESPACE, control_handle
from llmrun_runtime.environments import Environments
from llmrun_runtime.logs import read_logs


class NodeAgent:
    """What control can ask of a node."""

    def __init__(self) -> None:
        self._root = Settings().root
        control = control_handle()

        async def fetch(digest: str) -> bytes:
            package: bytes = await control.package.remote(digest)
            return package

        self._environments = Environments(self._root, fetch)

    async def prepare(self, spec: ModelSpec) -> None:
        """Bring the model's code and requirements here. Raises EngineError."""
        if spec.code:
            await self._environments.code(spec.code.package)
        if spec.requirements:
            await self._environments.requirements(spec.requirements)

    async def logs(self, model: str, offsets: dict[str, int], tail: int) -> dict[str, tuple[int, str]]:
        """See `read_logs`."""
        return read_logs(self._root, model, offsets, tail)


def agent_on(node_id: str) -> Any:
    """A handle to the node's agent, started if there is none."""
    return (
        ray.remote(NodeAgent)
        .options(
            name=f"node-{node_id}",
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote()
    )

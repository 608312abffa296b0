"""Sees that nodes are ready for what may wake there, and leaves those that an autoscaler could give back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

import ray

from llmrun_runtime.actors import NAMESPACE
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.state.operation import Operations
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.node.agent import agent_name, agent_on
from llmrun_runtime.placement import Node, Placement, could_run, has_room
from llmrun_runtime.ray_nodes import cluster_nodes
from llmrun_runtime.wire.replica_config import ReplicaConfig

log = logging.getLogger("llmrun.control")
LOOK_S = 15.0


class WarmNodes:
    """The nodes' agents, as far as control starts and ends them. `head` is the node that never leaves."""

    def __init__(
        self, scaling: Autoscaler, registry: Registry, jobs: Operations, idle_timeout: float, head: Callable[[], str]
    ) -> None:
        self._scaling = scaling
        self._registry = registry
        self._jobs = jobs
        self._idle_timeout = idle_timeout
        self._head = head
        self._used: dict[str, float] = {}

    async def run(self) -> None:
        """Look now and then, for ever."""
        while True:
            try:
                self.look(cluster_nodes(), time.monotonic())
            except Exception:
                log.exception("nodes could not be looked at; tried again")
            await asyncio.sleep(LOOK_S)

    def look(self, nodes: list[Node], now: float) -> None:
        """Have nodes that stay be ready for every model that could run there; end agents of nodes that may go.

        A node may go if an autoscaler brings nodes and it is not the head. There the agent comes with the first
        replica, and is ended when none has been there for `node_idle_timeout`: Ray keeps a node that has an actor.
        """
        elastic = any(not node.id for node in nodes)
        busy = {report.node for report, _ in self._registry.replicas.values()}
        for node in nodes:
            if not node.id:
                continue
            if not elastic or node.id == self._head():
                rows = self._scaling.deployed.values()
                for engine in {row.spec.engine for row in rows if could_run(row.placement, node)}:
                    agent_on(node.id).warm.remote(engine)
                continue
            if node.id in busy or self._jobs.running():
                self._used[node.id] = now
            elif now - self._used.setdefault(node.id, now) >= self._idle_timeout:
                leave(node.id)
                self._used[node.id] = now  # who needs it again has it for as long
        self._used = {node: when for node, when in self._used.items() if any(n.id == node for n in nodes)}


def prestart(placement: Placement, config: ReplicaConfig) -> None:
    """Have the engine of a first replica begun before Ray has brought the replica, where there is but one node for it.

    Not for engines with devices: Ray chooses those.
    """
    nodes = [node for node in cluster_nodes() if node.id and has_room(placement, [node])]
    if len(nodes) == 1 and not placement.gpus:
        agent_on(nodes[0].id).prestart.remote(config.to_dict())


def leave(node: str) -> None:
    """End a node's agent, if it has one."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(agent_name(node), namespace=NAMESPACE))
        log.info("left node %s, which has been idle", node[:12])

"""Keeps nodes ready for the models that may wake there, and releases idle nodes that an autoscaler can remove."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection

import ray

from llmrun_runtime.actors import NAMESPACE
from llmrun_runtime.control.state.models import Models
from llmrun_runtime.control.state.operation import Operations
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.node.agent import agent_name, agent_on
from llmrun_runtime.placement import Node, Placement, could_run, has_capacity
from llmrun_runtime.wire.replica_config import ReplicaConfig

log = logging.getLogger("llmrun.control")
CHECK_S = 15.0


class WarmNodes:
    """Starts and stops node agents. `head` returns the id of the head node, which is never removed."""

    def __init__(
        self,
        models: Models,
        registry: Registry,
        operations: Operations,
        idle_timeout: float,
        nodes: Callable[[], list[Node]],
        head: Callable[[], str],
    ) -> None:
        self._models = models
        self._registry = registry
        self._operations = operations
        self._idle_timeout = idle_timeout
        self._nodes = nodes
        self._head = head
        self._last_used: dict[str, float] = {}
        """By removable node (monotonic)."""

    async def run(self) -> None:
        """Check the nodes every CHECK_S. Never returns."""
        while True:
            try:
                self.check(self._nodes(), time.monotonic())
            except Exception:
                log.exception("node check failed, retrying")
            await asyncio.sleep(CHECK_S)

    def check(self, nodes: list[Node], now: float) -> None:
        """Warm permanent nodes for every model that could run there; stop the agents of idle removable nodes.

        A node is removable if the cluster has an autoscaler and it is not the head. There, the first replica starts the
        agent, which stops after `node_idle_timeout` without a replica: Ray keeps a node that has an actor.
        """
        has_autoscaler = any(not node.id for node in nodes)
        in_use = {report.node for report, _ in self._registry.replicas.values()}
        for node in nodes:
            if not node.id:
                continue
            if not has_autoscaler or node.id == self._head():
                rows = self._models.deployed.values()
                for engine in {row.spec.engine for row in rows if could_run(row.placement, node)}:
                    agent_on(node.id).warm.remote(engine)
                continue
            if node.id in in_use or self._operations.running():
                self._last_used[node.id] = now
            elif now - self._last_used.setdefault(node.id, now) >= self._idle_timeout:
                stop_agent(node.id)
                self._last_used[node.id] = now  # an agent that is started again stays for the whole timeout
        self._last_used = {node: when for node, when in self._last_used.items() if any(n.id == node for n in nodes)}


def prestart(placement: Placement, nodes: list[Node], config: ReplicaConfig, freed: Collection[str] = ()) -> None:
    """Start a model's first engine before Ray has started its replica, if only one node can hold it.

    Not for engines with devices: Ray chooses those. `freed`: the ids of nodes on which replicas have ended for it.
    """
    nodes = [node for node in nodes if node.id and (node.id in freed or has_capacity(placement, [node]))]
    if len(nodes) == 1 and not placement.gpus:
        agent_on(nodes[0].id).prestart.remote(config.to_dict())


def expect_replica(nodes: Collection[str]) -> None:
    """Have the agents of these nodes (ids) prepare for a replica that takes the room of another one."""
    for node in nodes:
        agent_on(node).expect_replica.remote()


def stop_agent(node: str) -> None:
    """Stop a node's agent, if it is running."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(agent_name(node), namespace=NAMESPACE))
        log.info("stopped the agent of idle node %s", node[:12])

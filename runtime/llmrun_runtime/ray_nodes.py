"""The nodes of the Ray cluster, with their total and free resources."""

from __future__ import annotations

import asyncio

import ray

from llmrun.errors import ClusterError
from llmrun_runtime import ray_internals
from llmrun_runtime.placement import Node

REFRESH_S = 0.5


def cluster_nodes() -> list[Node]:
    """The live nodes, then the kinds of node that an autoscaler can add. Asks Ray's GCS three times, and blocks.

    Raises ClusterError without a live node.
    """
    available = ray_internals.available_resources()
    nodes = [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], available.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    if not nodes:
        raise ClusterError("the cluster has no live nodes")
    for group in ray_internals.autoscaler_node_groups():
        nodes.append(Node("", group.name, dict(group.resources), {}))
    return nodes


def real_nodes() -> list[Node]:
    """The live nodes."""
    return [node for node in cluster_nodes() if node.id]


class NodeSnapshot:
    """The cluster's nodes as they were a moment ago. Reading them does not block the event loop."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []

    def nodes(self) -> list[Node]:
        """The last result of `cluster_nodes`; the first call asks for it."""
        self._nodes = self._nodes or cluster_nodes()
        return self._nodes

    async def run(self) -> None:
        """Refresh the nodes every REFRESH_S. Never returns."""
        while True:
            self._nodes = await asyncio.to_thread(cluster_nodes)
            await asyncio.sleep(REFRESH_S)

"""The nodes of the Ray cluster, with their total and free resources."""

from __future__ import annotations

import ray

from llmrun.errors import ClusterError
from llmrun_runtime import ray_internals
from llmrun_runtime.placement import Node


def cluster_nodes() -> list[Node]:
    """The live nodes, then the kinds of node that an autoscaler can add. Raises ClusterError without a live node."""
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

"""The nodes of the Ray cluster, with what each has and has free."""

from __future__ import annotations

from typing import Any

import ray

from llmrun.errors import ClusterError
from llmrun_runtime.placement import Node


def cluster_nodes() -> list[Node]:
    """The nodes that live, and the kinds of node that an autoscaler could bring."""
    state = ray._private.state.state
    available = state.available_resources_per_node()
    nodes = [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"], available.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    if not nodes:
        raise ClusterError("the cluster has no nodes that live")
    config: Any = state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        nodes.append(Node("", group.name, dict(group.resources), {}))
    return nodes


def real_nodes() -> list[Node]:
    """The nodes that live."""
    return [node for node in cluster_nodes() if node.id]

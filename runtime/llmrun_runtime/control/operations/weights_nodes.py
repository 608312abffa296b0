"""Chooses how many nodes get a model's weights at its deploy, and which first. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmrun.spec import ModelSpec
from llmrun_runtime.placement import Node, Placement

# One node can fail, and the next wake still finds the weights.
MIN_NODES = 2


def count_weights_nodes(spec: ModelSpec, placement: Placement, nodes: Sequence[Node]) -> int:
    """Return how many of `nodes`, in their order, get the weights: `weights_nodes`, at least what one replica spans.

    By default enough for `max_replicas`, if the nodes were empty, and at least MIN_NODES.
    """
    count = spec.weights_nodes
    if not count:
        missing = spec.max_replicas * placement.nodes
        for node in nodes:
            if missing <= 0:
                break
            missing -= _replicas_on(node, placement)
            count += 1
        count = max(count, MIN_NODES)
    return min(max(count, placement.nodes), len(nodes))


def freest_first(nodes: Iterable[Node]) -> list[Node]:
    """Sort nodes by their free GPUs, then their free CPUs; equal ones by address."""
    return sorted(nodes, key=lambda node: (-node.available.get("GPU", 0), -node.available.get("CPU", 0), node.host))


def _replicas_on(node: Node, placement: Placement) -> int:
    """Return how many replicas, or shares of one, the empty node holds; at least one, as it could run the model."""
    counts = [node.total.get(key, 0) / amount for key, amount in placement.resources().items() if amount]
    return max(1, int(min(counts, default=1) + 1e-9))

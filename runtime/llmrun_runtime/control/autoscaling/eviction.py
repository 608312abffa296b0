"""Chooses the idle replicas to evict for another model's replica. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmrun_runtime.placement import Node, Placement, could_run, has_capacity


@dataclass(frozen=True)
class EvictionCandidate:
    """A replica that may be evicted.

    Its model is `evictable` and has no requests; it is above `min_replicas` and has been up for `min_uptime`.
    """

    id: str
    model: str
    node: str
    placement: Placement
    idle_since: float


def choose_evictions(
    placement: Placement, nodes: Sequence[Node], candidates: Sequence[EvictionCandidate]
) -> list[EvictionCandidate]:
    """Return the replicas to evict so that a replica of `placement` fits; [] if evicting all would not be enough.

    1. On each node that can hold it (or its share), take those idle for longest until it fits.
    2. Keep the ones that turn out not to be necessary.
    3. Choose the node (or as many as it spans) that needs no eviction, or whose last victim was idle for longest.

    A candidate that spans nodes counts on its first node only.
    """
    options: list[list[EvictionCandidate]] = []
    share = replace(placement, nodes=1)
    for node in nodes:
        if not node.id or not could_run(placement, node):
            continue
        victims: list[EvictionCandidate] = []
        # 1.
        for candidate in sorted((c for c in candidates if c.node == node.id), key=lambda c: c.idle_since):
            if _fits_without(victims, share, node):
                break
            victims.append(candidate)
        if not _fits_without(victims, share, node):
            continue
        # 2.
        for candidate in list(victims):
            others = [victim for victim in victims if victim is not candidate]
            if _fits_without(others, share, node):
                victims = others
        options.append(victims)
    # 3.
    options.sort(key=lambda victims: max((victim.idle_since for victim in victims), default=0))
    chosen = options[: placement.nodes]
    return [victim for victims in chosen for victim in victims] if len(chosen) == placement.nodes else []


def _fits_without(victims: Sequence[EvictionCandidate], placement: Placement, node: Node) -> bool:
    available = dict(node.available)
    for victim in victims:
        for key, amount in victim.placement.resources().items():
            available[key] = available.get(key, 0) + amount
    return has_capacity(placement, [Node(node.id, node.host, node.total, available)])

"""Who makes room for a model that wakes: idle replicas of others. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmrun_runtime.placement import Node, Placement, could_run, has_room


@dataclass(frozen=True)
class EvictionCandidate:
    """A replica that nobody asks, above `min_replicas`, up for `min_uptime`, of a model that is `evictable`."""

    id: str
    model: str
    node: str
    placement: Placement
    idle_since: float


def choose_evictions(
    placement: Placement, nodes: Sequence[Node], holders: Sequence[EvictionCandidate]
) -> list[EvictionCandidate]:
    """The replicas that have to end so that one of `placement` fits; [] if even all of them would not do.

    1. On each node that could hold it (or its share), those idle for longest go first, until it fits.
    2. Those of them that turn out not to be needed stay.
    3. Of the nodes, the one (or as many as it spans) where nobody has to go, or the last has been idle for longest.

    A replica that spans nodes counts as on its first one.
    """
    found: list[list[EvictionCandidate]] = []
    share = replace(placement, nodes=1)
    for node in nodes:
        if not node.id or not could_run(placement, node):
            continue
        going: list[EvictionCandidate] = []
        # 1.
        for holder in sorted((h for h in holders if h.node == node.id), key=lambda h: h.idle_since):
            if _fits(share, node, going):
                break
            going.append(holder)
        if not _fits(share, node, going):
            continue
        # 2.
        for holder in list(going):
            others = [h for h in going if h is not holder]
            if _fits(share, node, others):
                going = others
        found.append(going)
    # 3.
    found.sort(key=lambda going: max((h.idle_since for h in going), default=0))
    chosen = found[: placement.nodes]
    return [holder for going in chosen for holder in going] if len(chosen) == placement.nodes else []


def _fits(placement: Placement, node: Node, going: Sequence[EvictionCandidate]) -> bool:
    available = dict(node.available)
    for holder in going:
        for key, amount in holder.placement.resources().items():
            available[key] = available.get(key, 0) + amount
    return has_room(placement, [Node(node.id, node.host, node.total, available)])

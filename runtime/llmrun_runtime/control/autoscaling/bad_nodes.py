"""The nodes on which a version's starts fail, and which of them are set aside. Pure; the clock is an argument."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

# A start that fails twice on a node will probably fail there again, for example because of its GPU or its disk.
FAILURES = 2
# After this time, the node is tried again.
SET_ASIDE_S = 1800.0


@dataclass(frozen=True)
class NodeFailure:
    """The failed starts of one version on one node; `at` is the time of the last one (monotonic)."""

    host: str
    count: int
    cause: str
    at: float


class BadNodes:
    """The failed starts of one version by node."""

    def __init__(self) -> None:
        self._failures: dict[str, NodeFailure] = {}

    def failed(self, node: str, host: str, cause: str, now: float) -> None:
        """Record a failed start on a node."""
        last = self._failures.get(node)
        self._failures[node] = NodeFailure(host, last.count + 1 if last else 1, cause, now)

    def ready(self, node: str) -> None:
        """Forget the failures on a node: a replica is ready there."""
        self._failures.pop(node, None)

    def set_aside(self, able: Collection[str], now: float) -> dict[str, NodeFailure]:
        """Return the nodes to avoid among those that could run the version; none if that would leave no other node."""
        bad = {
            node: failure
            for node, failure in self._failures.items()
            if node in able and failure.count >= FAILURES and now - failure.at < SET_ASIDE_S
        }
        return bad if len(bad) < len(able) else {}


def describe(nodes: Collection[NodeFailure]) -> str:
    """Say which nodes are set aside and why, in one line; "" if none is."""
    minutes = f"{SET_ASIDE_S / 60:g} min"
    return "; ".join(
        f"node {node.host} is set aside for {minutes} after {node.count} failed starts: {node.cause}" for node in nodes
    )

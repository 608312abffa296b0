"""Chooses the replicas that end so that another model's replica fits. Pure; the clock is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmrun_runtime.placement import Node, Placement, could_run, has_capacity
from llmrun_runtime.wire.reports import PRIORITIES, ReplicaReport

# The ranks of candidates: the lower ones go first.
UNWANTED, IDLE, BUSY = range(3)
# A request that has just left the queue is in flight a moment later, or at another ingress.
UNWANTED_AFTER_S = 1.0
BATCH = PRIORITIES.index("batch")


@dataclass(frozen=True)
class EvictionCandidate:
    """A replica that may end for another model. Its model is `evictable`, and it is above `min_replicas`."""

    id: str
    model: str
    node: str
    placement: Placement
    rank: int
    since: float
    """Within a rank, the lowest goes first: idle since then, or protected by `min_uptime` until then (monotonic)."""

    @property
    def order(self) -> tuple[int, float]:
        """The order in which candidates go."""
        return self.rank, self.since


@dataclass(frozen=True)
class Turn:
    """A model that waits for room."""

    priority: int
    """The highest priority of its waiting requests: an index in PRIORITIES."""
    waited: float
    """Seconds."""
    max_wait: float
    """Seconds; its `max_wait_for_room`."""

    def takes_from(self, priority: int) -> bool:
        """Whether a busy model, whose requests have up to that priority, gives way.

        1. Batch gives way to a higher priority at once.
        2. A higher priority never gives way to batch.
        3. Otherwise the other gives way after `max_wait`.
        """
        # 1.
        if priority == BATCH < self.priority:
            return True
        # 2.
        if self.priority == BATCH < priority:
            return False
        # 3.
        return self.waited >= self.max_wait


@dataclass(frozen=True)
class Usage:
    """How a replica and its model are used."""

    now: float
    quiet_since: float
    """Since when the model has no request, waiting or in flight; 0 if it has one."""
    ready_since: float
    """0 if the replica is not ready."""
    served: bool
    """Whether the replica has served a request."""
    warmed: bool
    """Whether `llmrun warm` started the model."""
    min_uptime: float


def rank(usage: Usage, gives_way: bool) -> int | None:
    """Return a replica's rank as a candidate; None if it stays. `gives_way`: whether its model would, if busy.

    1. Its callers left before it served one: nobody wants this start, `min_uptime` does not protect it.
    2. It is starting, or younger than `min_uptime`: it stays.
    3. Its model has no requests: it is idle.
    4. Its model has requests: it gives way if the other's turn has come.
    """
    quiet = bool(usage.quiet_since)
    # 1.
    unused = not usage.served and not usage.warmed
    if quiet and unused and usage.now - usage.quiet_since >= UNWANTED_AFTER_S:
        return UNWANTED
    # 2.
    if not usage.ready_since or usage.now - usage.ready_since < usage.min_uptime:
        return None
    # 3.
    if quiet:
        return IDLE
    # 4.
    return BUSY if gives_way else None


def stop_order(
    replicas: Iterable[ReplicaReport], all_replicas: Iterable[ReplicaReport], first_seen: Mapping[str, float], head: str
) -> list[ReplicaReport]:
    """Return a model's replicas in the order in which Serve stops them when the target is lowered.

    Those on the head node last; on the node with the fewest replicas first; there, the newest first. From
    `DeploymentScheduler._get_replicas_to_stop` of Ray 2.60: Serve cannot be told which replica to stop.
    """
    counts = Counter(report.node for report in all_replicas)
    return sorted(replicas, key=lambda r: (r.node == head, counts[r.node], r.node, -first_seen.get(r.id, 0)))


def choose_evictions(
    placement: Placement, nodes: Sequence[Node], candidates: Sequence[EvictionCandidate]
) -> list[EvictionCandidate]:
    """Return the replicas to evict so that a replica of `placement` fits; [] if evicting all would not be enough.

    1. On each node that can hold it (or its share), take candidates in their order until it fits.
    2. Keep the ones that turn out not to be necessary.
    3. Add the ones that Serve stops before those: each model's candidates are given in that order.
    4. Choose the node (or as many as it spans) that needs no eviction, or whose last victim comes first.

    A candidate that spans nodes counts on its first node only.
    """
    options: list[list[EvictionCandidate]] = []
    share = replace(placement, nodes=1)
    for node in nodes:
        if not node.id or not could_run(placement, node):
            continue
        victims: list[EvictionCandidate] = []
        # 1.
        for candidate in sorted((c for c in candidates if c.node == node.id), key=lambda c: c.order):
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
        # 3.
        options.append(_with_earlier(victims, candidates))
    # 4.
    options.sort(key=lambda victims: max((victim.order for victim in victims), default=(-1, 0.0)))
    chosen = options[: placement.nodes]
    victims = [victim for victims in chosen for victim in victims]
    return list(dict.fromkeys(victims)) if len(chosen) == placement.nodes else []


def _with_earlier(
    victims: Sequence[EvictionCandidate], candidates: Sequence[EvictionCandidate]
) -> list[EvictionCandidate]:
    last = {candidate.model: index for index, candidate in enumerate(candidates) if candidate in victims}
    return [c for index, c in enumerate(candidates) if index <= last.get(c.model, -1)]


def _fits_without(victims: Sequence[EvictionCandidate], placement: Placement, node: Node) -> bool:
    available = dict(node.available)
    for victim in victims:
        for key, amount in victim.placement.resources().items():
            available[key] = available.get(key, 0) + amount
    return has_capacity(placement, [Node(node.id, node.host, node.total, available)])

"""The scaling rule: the state of a model in, its target number of replicas out. Pure; its clock is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass

# A failed start is told to those who wait; until they have left, their waiting asks for nothing.
SETTLE_S = 1.0
# After a failed start nothing is tried unasked for so long, doubled with each failure in a row up to the most.
PAUSE_S, MOST_PAUSE_S = 5.0, 1800.0
# After so many failures in a row those who ask are refused at once while the pause lasts.
FAILURES_BEFORE_REFUSAL = 3


@dataclass(frozen=True)
class Failure:
    """The failed starts in a row of what is in force, and when the last one was."""

    count: int
    cause: str
    at: float

    def paused(self, now: float) -> bool:
        """Whether nothing is tried unasked."""
        return now - self.at < min(PAUSE_S * 2.0 ** (self.count - 1), MOST_PAUSE_S)

    def refuses(self, now: float) -> bool:
        """Whether nothing is tried even when somebody asks."""
        return self.count >= FAILURES_BEFORE_REFUSAL and self.paused(now)


@dataclass(frozen=True)
class Demand:
    """What is asked of one model, and what runs. Times in seconds on one monotonic clock."""

    now: float
    target: int
    """The target that is set now."""
    ready: int
    """Replicas that answer."""
    waiting: int
    """Requests that wait in the ingress for a replica."""
    in_flight: int
    """Requests at replicas."""
    last_used: float
    """When a request last waited or was in flight."""
    low_since: float
    """Since when the load could do with fewer replicas than the target."""
    placed: int = 0
    """Replicas that have reported, ready or not."""
    pending: bool = False
    """Whether the target was raised and not all of that has been placed yet."""
    unloaded: bool = False
    """Somebody has asked for it to be at zero."""
    failure: Failure | None = None


@dataclass(frozen=True)
class ScalingLimits:
    """What the model's author set."""

    min_replicas: int
    max_replicas: int
    target_ongoing_requests: int
    idle_timeout: float

    def needed(self, asked: int) -> int:
        """Replicas for so many requests, waiting and in flight together, within the limits."""
        return min(max(math.ceil(asked / self.target_ongoing_requests), self.min_replicas), self.max_replicas)


@dataclass(frozen=True)
class Decision:
    """The target, and the number of the step that chose it."""

    target: int
    step: int


def decide(limits: ScalingLimits, demand: Demand) -> Decision:
    """Choose the target number of replicas.

    1. The last start failed, and either its waiters have not all left yet, or it has failed too often, or
       nobody asks and the pause is not over: what is ready stays, and nothing is started.
    2. It was unloaded by hand, and nobody waits: zero; those in flight are answered first.
    3. More replicas are needed than the target: grow to that at once, in one step.
    4. It has failed too often, and the pause is over: try one, though nobody asks.
    5. Nobody asks any more, and what was wanted has not been placed yet: take that back.
    6. Nobody has asked for `idle_timeout`: shrink to `min_replicas`.
    7. Fewer have been needed for `idle_timeout`: shrink to that, but not below one.
    8. Otherwise all stays as it is, within the limits.
    """
    asked = demand.waiting + demand.in_flight
    # 1.
    failure = demand.failure
    if failure and (
        demand.now - failure.at < SETTLE_S
        or failure.refuses(demand.now)
        or (not demand.waiting and failure.paused(demand.now))
    ):
        return Decision(min(demand.ready, demand.target), 1)
    # 2.
    if demand.unloaded and not demand.waiting:
        return Decision(0, 2)
    # 3.
    needed = limits.needed(asked)
    if needed > demand.target:
        return Decision(needed, 3)
    # 4.
    if failure and failure.count >= FAILURES_BEFORE_REFUSAL:
        return Decision(max(demand.target, 1), 4)
    # 5.
    if demand.pending and not asked and demand.placed < demand.target:
        return Decision(max(limits.min_replicas, demand.placed), 5)
    # 6.
    if not asked and demand.now - demand.last_used >= limits.idle_timeout:
        return Decision(limits.min_replicas, 6)
    # 7.
    if demand.target > max(needed, 1) and demand.now - demand.low_since >= limits.idle_timeout:
        return Decision(max(needed, 1), 7)
    # 8.
    return Decision(min(demand.target, limits.max_replicas), 8)

"""The autoscaling policy: a model's demand in, its target number of replicas out. Pure; the clock is an argument."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Waiting requests fail when a start fails. Until they have left the queue, they do not count as demand.
SETTLE_S = 1.0
# The back-off after a failed start. It doubles with each failure in a row, up to the maximum.
BACKOFF_S, MAX_BACKOFF_S = 5.0, 1800.0
MAX_DOUBLINGS = 20  # more than enough to reach the maximum
# After this many failures in a row, requests are refused at once during the back-off.
FAILURES_BEFORE_REFUSAL = 3


@dataclass(frozen=True)
class Failure:
    """The active version's failed starts in a row. `at` is the time of the last one (monotonic)."""

    count: int
    cause: str
    at: float

    def backs_off(self, now: float) -> bool:
        """Whether no start is tried without a request."""
        doublings = min(self.count - 1, MAX_DOUBLINGS)  # 2.0 ** 1024 is an OverflowError
        return now - self.at < min(BACKOFF_S * 2.0**doublings, MAX_BACKOFF_S)

    def refuses(self, now: float) -> bool:
        """Whether no start is tried even for a request."""
        return self.count >= FAILURES_BEFORE_REFUSAL and self.backs_off(now)


@dataclass(frozen=True)
class Demand:
    """One model's load and replicas. Times are in seconds on one monotonic clock."""

    now: float
    target: int
    """The current target."""
    ready: int
    """Replicas that serve requests."""
    waiting: int
    """Requests that wait in the ingress for a replica."""
    in_flight: int
    """Requests at replicas."""
    last_used: float
    """When a request last waited or was in flight."""
    low_since: float
    """Since when fewer replicas than the target would be enough."""
    placed: int = 0
    """Replicas that have reported, ready or not."""
    pending: bool = False
    """Whether the target was raised and some of the new replicas are not placed yet."""
    unloaded: bool = False
    """Whether `llmrun unload` scaled it to zero."""
    failure: Failure | None = None


@dataclass(frozen=True)
class ScalingLimits:
    """The options that the model's author set."""

    min_replicas: int
    max_replicas: int
    target_ongoing_requests: int
    idle_timeout: float

    def required(self, requests: int) -> int:
        """Return the replicas for that many requests, waiting or in flight, within the limits."""
        return min(max(math.ceil(requests / self.target_ongoing_requests), self.min_replicas), self.max_replicas)


@dataclass(frozen=True)
class Decision:
    """The target, and the number of the step that chose it."""

    target: int
    step: int


def decide(limits: ScalingLimits, demand: Demand) -> Decision:
    """Choose the target number of replicas.

    1. The last start failed, and its waiting requests have not all left yet, or the model refuses requests, or it
       backs off and none waits: keep what is ready, start nothing.
    2. It was unloaded by hand and no request waits: scale to zero. Requests in flight finish first.
    3. The load requires more replicas than the target: scale up to that number in one step.
    4. It refused requests, and the back-off has ended: try one replica without a request.
    5. All requests have left, and some replicas are not placed yet: give those up.
    6. No request for `idle_timeout`: scale down to `min_replicas`.
    7. Fewer replicas were enough for `idle_timeout`: scale down to those, but not below one.
    8. Otherwise keep the target, within the limits.
    """
    requests = demand.waiting + demand.in_flight
    # 1.
    failure = demand.failure
    if failure and (
        demand.now - failure.at < SETTLE_S
        or failure.refuses(demand.now)
        or (not demand.waiting and failure.backs_off(demand.now))
    ):
        return Decision(min(demand.ready, demand.target), 1)
    # 2.
    if demand.unloaded and not demand.waiting:
        return Decision(0, 2)
    # 3.
    required = limits.required(requests)
    if required > demand.target:
        return Decision(required, 3)
    # 4.
    if failure and failure.count >= FAILURES_BEFORE_REFUSAL:
        return Decision(max(demand.target, 1), 4)
    # 5.
    if demand.pending and not requests and demand.placed < demand.target:
        return Decision(max(limits.min_replicas, demand.placed), 5)
    # 6.
    if not requests and demand.now - demand.last_used >= limits.idle_timeout:
        return Decision(limits.min_replicas, 6)
    # 7.
    if demand.target > max(required, 1) and demand.now - demand.low_since >= limits.idle_timeout:
        return Decision(max(required, 1), 7)
    # 8.
    return Decision(min(demand.target, limits.max_replicas), 8)

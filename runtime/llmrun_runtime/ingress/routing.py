"""Which replica a request goes to. Pure: a model's routes and the requests in flight at each in, one of them out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from llmrun_runtime.table import ModelRoute, ReplicaRoute


def choose(model: ModelRoute, in_flight: Mapping[str, int], avoid: Collection[str] = ()) -> ReplicaRoute | None:
    """The replica to ask, or None if the request has to wait.

    1. Replicas that have just failed this request are out.
    2. Replicas with `max_ongoing` requests in flight are out.
    3. Of the others, the one with the fewest in flight; at a tie the first.
    """
    free = [
        replica
        for replica in model.replicas
        if replica.id not in avoid and in_flight.get(replica.id, 0) < model.max_ongoing
    ]
    return min(free, key=lambda replica: in_flight.get(replica.id, 0), default=None)

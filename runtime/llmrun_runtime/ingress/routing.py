"""Which replica a request goes to. Pure: a model's routes and the requests in flight at each in, one of them out."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from llmrun_runtime.wire.routing_table import ModelRoute, ReplicaRoute

# A replica that has probably seen the beginning of the prompt may have so many requests more than the least busy one.
AFFINITY_SLACK = 4


def choose(
    model: ModelRoute,
    in_flight: Mapping[str, int],
    avoid: Collection[str] = (),
    prefix: bytes = b"",
    adapter: str = "",
) -> ReplicaRoute | None:
    """The replica to ask, or None if the request has to wait.

    1. Replicas that have just failed this request are out.
    2. Replicas with `max_ongoing` requests in flight are out.
    3. Of the others, those that have loaded the `adapter` (its pin) are preferred, unless the least busy of them has
       AFFINITY_SLACK requests more in flight than the least busy of all, which then loads it too.
    4. Prompts with an equal `prefix` go to the same one, whose cache has it, unless that has AFFINITY_SLACK requests
       more in flight than the least busy one. (Rendezvous hashing: replicas that come and go move few prefixes.)
    5. Of the others, the one with the fewest in flight; at a tie the first.
    """
    # 1. 2.
    free = [
        replica
        for replica in model.replicas
        if replica.id not in avoid and in_flight.get(replica.id, 0) < model.max_ongoing
    ]
    if not free:
        return None
    least = min(free, key=lambda replica: in_flight.get(replica.id, 0))
    # 3.
    loaded = [replica for replica in free if adapter and adapter in replica.adapters]
    if loaded:
        best = min(loaded, key=lambda replica: in_flight.get(replica.id, 0))
        if in_flight.get(best.id, 0) <= in_flight.get(least.id, 0) + AFFINITY_SLACK:
            free, least = loaded, best
    # 4.
    if prefix and len(free) > 1:
        home = max(free, key=lambda replica: _weight(replica, prefix))
        if in_flight.get(home.id, 0) <= in_flight.get(least.id, 0) + AFFINITY_SLACK:
            return home
    # 5.
    return least


def _weight(replica: ReplicaRoute, prefix: bytes) -> bytes:
    return hashlib.blake2b(prefix, key=replica.id.encode()[:64], digest_size=8).digest()

"""Chooses the replica for a request. Pure: it sees a model's replicas and the number of requests in flight at each."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from llmrun_runtime.wire.routing_table import ModelRoute, ReplicaRoute

# A replica that probably has the prefix cached can have this many more requests in flight than the least busy one.
AFFINITY_SLACK = 4


def choose(
    model: ModelRoute,
    in_flight: Mapping[str, int],
    avoid: Collection[str] = (),
    prefix: bytes = b"",
    adapter: str = "",
) -> ReplicaRoute | None:
    """Return the replica to use, or None if the request must wait.

    1. Exclude replicas in `avoid`: they have just failed this request.
    2. Exclude replicas with `max_ongoing` requests in flight.
    3. Prefer replicas that have loaded `adapter` (a pin), unless the least busy of them has over AFFINITY_SLACK more
       requests in flight than the least busy of all, which then loads it too.
    4. Send equal prefixes to the same replica, whose cache has them, unless it has over AFFINITY_SLACK more requests in
       flight than the least busy one. (Rendezvous hashing: adding or removing a replica moves few prefixes.)
    5. Otherwise take the least busy one; the first of several.
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

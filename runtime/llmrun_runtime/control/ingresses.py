"""Creates ingresses that are missing: Ray does not restart an actor that was killed by `ray.kill`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from llmrun_runtime.actors import ClusterActors, actor_names

log = logging.getLogger("llmrun.control")
CHECK_S = 2.0
# Longer than the start of a cluster leaves an ingress uncreated.
MISSING_S = 10.0


class MissingIngresses:
    """Which of the expected ingresses have been missing for MISSING_S."""

    def __init__(self, expected: Iterable[str]) -> None:
        self._expected = list(expected)
        self._since: dict[str, float] = {}

    def update(self, names: Iterable[str], now: float) -> list[str]:
        """Return those to create, given the actors that exist; `now` is monotonic."""
        missing = set(self._expected) - set(names)
        self._since = {name: self._since.get(name, now) for name in self._expected if name in missing}
        return [name for name, since in self._since.items() if now - since >= MISSING_S]


async def keep_ingresses(actors: ClusterActors) -> None:
    """Create missing ingresses. Never returns. Raises RayError while Ray's head does not respond."""
    missing = MissingIngresses(actors.ingress_names)
    while True:
        for name in missing.update(await asyncio.to_thread(actor_names), time.monotonic()):
            log.error("there is no actor %s: creating it", name)
            await asyncio.to_thread(actors.create_ingress, name)
        await asyncio.sleep(CHECK_S)

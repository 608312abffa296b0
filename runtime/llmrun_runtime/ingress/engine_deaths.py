"""Which requests were in engines that died, so that none ends a third one. In memory; the clock is an argument."""

from __future__ import annotations

import hashlib

FORGET_S = 600.0
MAX_REQUESTS = 1000
MAX_ENGINES = 2


class EngineDeaths:
    """The replicas whose engines died while they ran a request, by the request's digest. The oldest are dropped."""

    def __init__(self) -> None:
        self._deaths: dict[bytes, tuple[float, frozenset[str]]] = {}

    def add(self, request: bytes, replica: str, now: float) -> None:
        """Record that a replica's engine died while it ran the request."""
        self._trim(now)
        _, replicas = self._deaths.pop(request, (now, frozenset[str]()))
        self._deaths[request] = now, replicas | {replica}
        if len(self._deaths) > MAX_REQUESTS:
            del self._deaths[next(iter(self._deaths))]

    def blocks(self, request: bytes, now: float) -> bool:
        """Whether MAX_ENGINES engines have died while they ran the request."""
        self._trim(now)
        _, replicas = self._deaths.get(request, (now, frozenset[str]()))
        return len(replicas) >= MAX_ENGINES

    def forget(self, request: bytes) -> None:
        """Drop a request that an engine has responded to."""
        self._deaths.pop(request, None)

    def __len__(self) -> int:
        return len(self._deaths)

    def _trim(self, now: float) -> None:
        while self._deaths and (oldest := next(iter(self._deaths))) and self._deaths[oldest][0] <= now - FORGET_S:
            del self._deaths[oldest]


def request_digest(model: str, version: int, path: str, body: bytes) -> bytes:
    """Return a digest that equal requests for one version of a model share."""
    head = f"{model}\n{version}\n{path}\n".encode()
    digest = hashlib.blake2b(head, digest_size=16)
    digest.update(body)
    return digest.digest()

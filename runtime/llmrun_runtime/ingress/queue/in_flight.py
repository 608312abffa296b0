"""Counts the requests in flight: by model, replica, key and adapter."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable
from typing import TypeVar

from llmrun_runtime.ingress.queue.claim import ANONYMOUS, Claim
from llmrun_runtime.wire.reports import BETWEEN_REQUESTS_S

T = TypeVar("T", bound=Hashable)


class InFlight:
    """The counters. Probes are not counted by model and priority; entries at zero are removed."""

    def __init__(self) -> None:
        self.by_model: Counter[str] = Counter()
        self.by_priority: Counter[tuple[str, int]] = Counter()
        """By model and priority."""
        self.by_replica: Counter[str] = Counter()
        self.by_key: Counter[tuple[str, str]] = Counter()
        """By model and key."""
        self.by_adapter: Counter[tuple[str, str]] = Counter()
        """By model and the adapter's label in metrics."""
        self._ended: dict[tuple[str, int], float] = {}
        """By model and priority, when (monotonic) a request last ended."""

    def add(self, claim: Claim, change: int) -> None:
        """Count the claim (`change` is 1), or no longer (-1)."""
        replica, key = claim.replica.id, (claim.model, claim.caller.key)
        adapter = (claim.model, claim.caller.adapter_label)
        if not claim.caller.probe:
            _add(self.by_model, claim.model, change)
            group = (claim.model, claim.caller.priority)
            _add(self.by_priority, group, change)
            if change < 0:
                self._ended[group] = time.monotonic()
        _add(self.by_replica, replica, change)
        _add(self.by_key, key, change)
        _add(self.by_adapter, adapter, change)

    def recent(self) -> set[str]:
        """Return the models of which a request ended in the last BETWEEN_REQUESTS_S; forget the others."""
        since = time.monotonic() - BETWEEN_REQUESTS_S
        self._ended = {group: when for group, when in self._ended.items() if when > since}
        return {model for model, _ in self._ended}

    def priority(self, model: str) -> int:
        """Return the highest priority of the model's requests in flight and of the recent ones, without probes."""
        priorities = [priority for name, priority in (*self.by_priority, *self._ended) if name == model]
        return max(priorities, default=ANONYMOUS.priority)


def _add(counter: Counter[T], entry: T, change: int) -> None:
    counter[entry] += change
    if not counter[entry]:
        del counter[entry]

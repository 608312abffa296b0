"""Counts the requests in flight: by model, replica, key and adapter."""

from __future__ import annotations

from collections import Counter

from llmrun_runtime.ingress.queue.claim import Claim


class InFlight:
    """The counters. Probes are not counted by model; entries at zero are removed, except by model."""

    def __init__(self) -> None:
        self.by_model: Counter[str] = Counter()
        self.by_replica: Counter[str] = Counter()
        self.by_key: Counter[tuple[str, str]] = Counter()
        """By model and key."""
        self.by_adapter: Counter[tuple[str, str]] = Counter()
        """By model and the adapter's label in metrics."""

    def add(self, claim: Claim, change: int) -> None:
        """Count the claim (`change` is 1), or no longer (-1)."""
        replica, key = claim.replica.id, (claim.model, claim.caller.key)
        adapter = (claim.model, claim.caller.adapter_label)
        self.by_model[claim.model] += 0 if claim.caller.probe else change
        self.by_replica[replica] += change
        self.by_key[key] += change
        self.by_adapter[adapter] += change
        if not self.by_replica[replica]:
            del self.by_replica[replica]
        if not self.by_key[key]:
            del self.by_key[key]
        if not self.by_adapter[adapter]:
            del self.by_adapter[adapter]

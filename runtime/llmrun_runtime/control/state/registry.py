"""What runs now: replicas as they report themselves, requests as the ingress counts them. In memory, pure.

Nothing here is stored: after a crash of control all of it comes back with the next reports.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from llmrun_runtime.wire.reports import LEASE_S, LocalUsage, ReplicaReport, Subject, Traffic


@dataclass
class Registry:
    """Reports by replica and by ingress, with the time of each."""

    replicas: dict[str, tuple[ReplicaReport, float]] = field(default_factory=dict)
    ingresses: dict[str, tuple[dict[str, Traffic], float]] = field(default_factory=dict)
    spent: dict[str, dict[Subject, LocalUsage]] = field(default_factory=dict)
    """By ingress, what those with limits have asked there."""
    last_used: dict[str, float] = field(default_factory=dict)
    ready_since: dict[str, float] = field(default_factory=dict)
    """When each replica that is ready became so."""

    def report(self, report: ReplicaReport, now: float) -> bool:
        """Take a replica's report; whether the routing table changed by it. A draining one does not turn back."""
        known = self.replicas.get(report.id)
        if known and known[0].state == "draining":
            report = replace(report, state="draining")
        self.replicas[report.id] = (report, now)
        if report.state == "ready":
            if not known or known[0].state != "ready":
                self.used(report.model, now)
                self.ready_since[report.id] = now
            self.used(report.model, now - report.idle_s)
        return not known or _routed(known[0]) != _routed(report)

    def demand(
        self, ingress: str, traffic: dict[str, Traffic], now: float, spent: dict[Subject, LocalUsage] | None = None
    ) -> None:
        """Take an ingress's counts."""
        self.ingresses[ingress] = (traffic, now)
        self.spent[ingress] = spent or {}
        for model, counts in traffic.items():
            if counts.waiting or counts.in_flight:
                self.used(model, now)

    def spent_elsewhere(self, ingress: str, subject: Subject) -> LocalUsage:
        """What a subject has asked of the other ingresses."""
        rows = [rows[subject] for key, rows in self.spent.items() if key != ingress and subject in rows]
        return LocalUsage(sum(row.requests for row in rows), sum(row.in_flight for row in rows))

    def used(self, model: str, when: float) -> None:
        """Note that a request waited or was in flight then."""
        self.last_used[model] = max(when, self.last_used.get(model, when))

    def remove(self, replica: str) -> bool:
        """Forget a replica; whether it was known."""
        self.ready_since.pop(replica, None)
        return self.replicas.pop(replica, None) is not None

    def expire(self, now: float) -> list[ReplicaReport]:
        """Forget who has been silent for LEASE_S; the replicas among them."""
        gone = [report for report, seen in self.replicas.values() if now - seen > LEASE_S]
        for report in gone:
            self.remove(report.id)
        self.ingresses = {key: row for key, row in self.ingresses.items() if now - row[1] <= LEASE_S}
        self.spent = {key: row for key, row in self.spent.items() if key in self.ingresses}
        return gone

    def lives(self, replica: str, *, draining: bool) -> bool:
        """Whether it is still there; or, `draining`, still there and on its way out."""
        known = self.replicas.get(replica)
        return known is not None and (known[0].state == "draining" or not draining)

    def of(self, model: str, version: int | None = None) -> list[ReplicaReport]:
        """The replicas of a model, or of one version of it."""
        rows = (report for report, _ in self.replicas.values())
        return [r for r in rows if r.model == model and version in (None, r.version)]

    def ready(self, model: str, version: int) -> list[ReplicaReport]:
        """Those that requests may go to."""
        return [report for report in self.of(model, version) if report.state == "ready"]

    def waiting(self, model: str) -> int:
        """Requests that wait in all ingresses."""
        return sum(traffic.waiting for traffic in self._traffic(model))

    def waiting_since(self, model: str) -> float:
        """Since when (unix time) somebody has been waiting; 0 if nobody waits."""
        return min((traffic.since for traffic in self._traffic(model) if traffic.since), default=0)

    def in_flight(self, model: str) -> int:
        """Requests at replicas: as the ingresses count them, or the shims, whichever knows of more."""
        by_shims = sum(report.in_flight for report in self.of(model))
        return max(by_shims, sum(traffic.in_flight for traffic in self._traffic(model)))

    def _traffic(self, model: str) -> Iterable[Traffic]:
        return (traffic[model] for traffic, _ in self.ingresses.values() if model in traffic)


def _routed(report: ReplicaReport) -> tuple[object, ...]:
    """What the ingress's table has of a replica."""
    address = (report.host, report.link, report.token)
    return (report.state, report.version, *address, report.paths, report.max_model_len, report.adapters)

"""The live state: replicas as they report themselves, requests as the ingresses count them. In memory, pure.

Nothing is stored: after a crash of control, the next reports restore it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from llmrun_runtime.wire.reports import LEASE_S, PRIORITIES, LocalUsage, ReplicaReport, Subject, Traffic

NORMAL = PRIORITIES.index("normal")


@dataclass
class Registry:
    """The last report of each replica and each ingress, with its time. All times are monotonic."""

    replicas: dict[str, tuple[ReplicaReport, float]] = field(default_factory=dict)
    ingresses: dict[str, tuple[dict[str, Traffic], float]] = field(default_factory=dict)
    local_usage: dict[str, dict[Subject, LocalUsage]] = field(default_factory=dict)
    """By ingress, the usage of subjects with limits."""
    last_used: dict[str, float] = field(default_factory=dict)
    """By model, when a request last waited or was in flight."""
    ready_since: dict[str, float] = field(default_factory=dict)
    """By replica."""
    first_seen: dict[str, float] = field(default_factory=dict)
    """By replica, the time of its first report."""
    served: set[str] = field(default_factory=set)
    """The replicas that have served a request."""
    silent: dict[str, tuple[ReplicaReport, float]] = field(default_factory=dict)
    """By replica, the last report of those that expired and did not stop, and when they expired."""
    _of_model: dict[str, dict[str, ReplicaReport]] = field(default_factory=dict, repr=False)
    """By model and replica: the autoscaler reads one model's reports several times per tick."""

    def report(self, report: ReplicaReport, now: float) -> bool:
        """Store a replica's report. Return whether the routing table changes. A draining replica stays draining."""
        previous, _ = self.replicas.get(report.id, (None, 0))
        if previous and previous.state == "draining":
            report = replace(report, state="draining")
        self.silent.pop(report.id, None)
        self.replicas[report.id] = (report, now)
        self._of_model.setdefault(report.model, {})[report.id] = report
        if report.in_flight or report.usage:
            self.served.add(report.id)
        self.first_seen.setdefault(report.id, now)
        if report.state == "ready":
            if not previous or previous.state != "ready":
                self.mark_used(report.model, now)
                self.ready_since[report.id] = now
            self.mark_used(report.model, now - report.idle_s)
        return not previous or _routing_fields(previous) != _routing_fields(report)

    def report_traffic(
        self, ingress: str, traffic: dict[str, Traffic], now: float, usage: dict[Subject, LocalUsage] | None = None
    ) -> None:
        """Store an ingress's counts, by model and by subject."""
        self.ingresses[ingress] = (traffic, now)
        self.local_usage[ingress] = usage or {}
        for model, counts in traffic.items():
            if counts.waiting or counts.in_flight:
                self.mark_used(model, now)

    def usage_elsewhere(self, ingress: str, subject: Subject) -> LocalUsage:
        """Return a subject's usage at the other ingresses."""
        rows = [rows[subject] for key, rows in self.local_usage.items() if key != ingress and subject in rows]
        return LocalUsage(
            sum(row.requests for row in rows), sum(row.in_flight for row in rows), sum(row.reserved for row in rows)
        )

    def mark_used(self, model: str, when: float) -> None:
        """Record that a request waited or was in flight then."""
        self.last_used[model] = max(when, self.last_used.get(model, when))

    def remove(self, replica: str) -> bool:
        """Remove a replica. Return whether it was registered."""
        self.silent.pop(replica, None)
        self.ready_since.pop(replica, None)
        self.first_seen.pop(replica, None)
        self.served.discard(replica)
        report, _ = self.replicas.pop(replica, (None, 0))
        if not report:
            return False
        of_model = self._of_model[report.model]
        del of_model[replica]
        if not of_model:
            del self._of_model[report.model]
        return True

    def keep_models(self, models: Collection[str]) -> None:
        """Forget when other models were last used: the replicas of a deleted model still report."""
        self.last_used = {model: when for model, when in self.last_used.items() if model in models}

    def expire(self, now: float) -> list[ReplicaReport]:
        """Remove replicas and ingresses without a report for LEASE_S. Return the replicas."""
        expired = [report for report, seen in self.replicas.values() if now - seen > LEASE_S]
        for report in expired:
            self.remove(report.id)
            self.silent[report.id] = (report, now)
        self.ingresses = {key: row for key, row in self.ingresses.items() if now - row[1] <= LEASE_S}
        self.local_usage = {key: row for key, row in self.local_usage.items() if key in self.ingresses}
        return expired

    def is_registered(self, replica: str, *, draining: bool) -> bool:
        """Whether a replica is registered; with `draining`, whether it is also draining."""
        report, _ = self.replicas.get(replica, (None, 0))
        return report is not None and (report.state == "draining" or not draining)

    def replicas_of(self, model: str, version: int | None = None) -> list[ReplicaReport]:
        """Return the replicas of a model, or of one version of it."""
        reports = self._of_model.get(model)
        return [r for r in reports.values() if version in (None, r.version)] if reports else []

    def placed(self, model: str, version: int) -> list[ReplicaReport]:
        """Return the replicas that are starting or ready: a draining one serves no new request."""
        return [report for report in self.replicas_of(model, version) if report.state != "draining"]

    def ready(self, model: str, version: int) -> list[ReplicaReport]:
        """Return the replicas that accept requests."""
        return [report for report in self.replicas_of(model, version) if report.state == "ready"]

    def waiting(self, model: str) -> int:
        """Return the number of requests that wait, at all ingresses."""
        return sum(traffic.waiting for traffic in self._traffic(model))

    def waiting_since(self, model: str) -> float:
        """Return since when (Unix time) requests have been waiting; 0 if none waits."""
        return min((traffic.since for traffic in self._traffic(model) if traffic.since), default=0)

    def in_flight(self, model: str) -> int:
        """Return the number of requests at replicas: the ingresses' count or the shims', whichever is larger."""
        by_shims = sum(report.in_flight for report in self.replicas_of(model))
        return max(by_shims, sum(traffic.in_flight for traffic in self._traffic(model)))

    def load(self, model: str, version: int) -> int:
        """Return the number of requests at the replicas of a version that accept requests.

        Those at draining replicas, and at replicas of the version before, need no new replica.
        """
        leaving = by_shims = 0
        for report in self.replicas_of(model):
            if report.version == version and report.state != "draining":
                by_shims += report.in_flight
            else:
                leaving += report.in_flight
        return max(by_shims, sum(traffic.in_flight for traffic in self._traffic(model)) - leaving)

    def waiting_priority(self, model: str) -> int:
        """Return the highest priority of the waiting requests, normal if none waits: an index in PRIORITIES."""
        return max((traffic.priority for traffic in self._traffic(model) if traffic.waiting), default=NORMAL)

    def priority(self, model: str) -> int:
        """Return the highest priority of the requests, waiting, in flight or recent; normal if there are none."""
        waiting = [traffic.priority for traffic in self._traffic(model) if traffic.waiting]
        served = [traffic.in_flight_priority for traffic in self._traffic(model) if traffic.in_flight or traffic.recent]
        return max([*waiting, *served], default=NORMAL)

    def quiet_since(self, model: str, version: int, now: float) -> float:
        """Return since when a model has had no request; 0 if it has one, or a recent one (`Traffic.recent`)."""
        recent = any(traffic.recent for traffic in self._traffic(model))
        return 0.0 if recent or self.waiting(model) or self.load(model, version) else self.last_used.get(model, now)

    def _traffic(self, model: str) -> Iterable[Traffic]:
        return (traffic[model] for traffic, _ in self.ingresses.values() if model in traffic)


def _routing_fields(report: ReplicaReport) -> tuple[object, ...]:
    """The fields that appear in the routing table."""
    address = (report.host, report.link, report.token)
    return (report.state, report.version, *address, report.paths, report.max_model_len, report.adapters)

"""Measures cold starts in parts, from the request that found no replica to its first token.

Cold starts are stored in the database and counted for Prometheus.

The ingress reports when the request arrived and when its first token came, the replica what happened on its node. All
times are Unix times, so between machines a part is as exact as their clocks.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

from llmrun.wire import START_PARTS, ColdStart
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.wire.reports import ReplicaReport

log = logging.getLogger("llmrun.control")
# A first token later than this after the start belongs to a request that did not wait for it.
FIRST_TOKEN_S = 60.0
# Seconds. A large model's first start on a node may take 30 minutes.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800)
Outcome = Literal["ready", "failed", "withdrawn"]
OUTCOMES: tuple[Outcome, ...] = ("ready", "failed", "withdrawn")


class ColdStarts:
    """The wakes in progress, and the record of the successful ones."""

    def __init__(self, database: Database, metrics: CollectorRegistry) -> None:
        self._database = database
        self._wakes: dict[tuple[str, int], tuple[float, float]] = {}
        """By model and version, when the wake was requested and decided."""
        self._unfinished: dict[str, ColdStart] = {}
        """By replica, the cold starts whose first token has not come yet."""
        self._usual: dict[str, float] = {}
        self._ended = Counter("llmrun_wakes", "Wakes that ended, by outcome.", ("model", "outcome"), registry=metrics)
        self._parts = Histogram(
            "llmrun_cold_start_part_seconds",
            "Duration of each part of a cold start.",
            ("model", "part"),
            registry=metrics,
            buckets=BUCKETS,
        )
        self._total = Histogram(
            "llmrun_cold_start_seconds",
            "Time from the request that found no replica to its first token.",
            ("model",),
            registry=metrics,
            buckets=BUCKETS,
        )

    def begin(self, model: str, version: int, requested: float) -> None:
        """Start a wake, for a request that has waited since `requested` (Unix time). A wake in progress continues."""
        self._wakes.setdefault((model, version), (requested, time.time()))

    def end(self, model: str, version: int, outcome: Outcome) -> tuple[float, float] | None:
        """End a wake. Return when it was requested and decided (Unix times); None if there was none."""
        wake = self._wakes.pop((model, version), None)
        if wake:
            self._ended.labels(model, outcome).inc()
        return wake

    def create_series(self, models: Iterable[str]) -> None:
        """Create the metrics of these models at 0: Prometheus sees no increase in a series that begins at 1."""
        for model in models:
            for outcome in OUTCOMES:
                self._ended.labels(model, outcome)
            for part in START_PARTS:
                self._parts.labels(model, part)
            self._total.labels(model)

    def replica_ready(self, report: ReplicaReport) -> None:
        """End the wake of the replica's version, if one is in progress."""
        wake = self.end(report.model, report.version, "ready")
        if not wake:
            return
        requested, decided = wake
        moments = {**report.moments, "decided": decided, "registered": time.time()}
        start = ColdStart(
            model=report.model,
            version=report.version,
            node=report.host,
            forked=report.forked,
            asked=requested,
            parts={part: max(0.0, round(moments[part] - requested, 3)) for part in START_PARTS if part in moments},
        )
        # Earlier ones of this model never get a first token: their requests left.
        self._forget_unfinished(report.model)
        self._unfinished[report.id] = start

    def first_tokens(self, moments: Mapping[str, float]) -> None:
        """Complete cold starts with the first bytes of requests that waited: replica id → Unix time."""
        for replica, moment in moments.items():
            start = self._unfinished.pop(replica, None)
            if start and moment - start.asked - start.parts["registered"] < FIRST_TOKEN_S:
                parts = {**start.parts, "first_token": max(0.0, round(moment - start.asked, 3))}
                self._record(start.model_copy(update={"parts": parts}))

    def usual(self, model: str) -> float:
        """Return the median of the model's last cold starts in seconds; 0 if there are none."""
        if model not in self._usual:
            self._usual[model] = 0.0
            self._database.submit(self._update_usual, model)
        return self._usual[model]

    def _update_usual(self, model: str) -> None:
        times = [start.parts["first_token"] for start in self.history(model) if "first_token" in start.parts]
        if times:
            self._usual[model] = round(statistics.median(times), 1)

    def forget(self, model: str) -> None:
        """Withdraw the wakes of a model that was removed."""
        self._usual.pop(model, None)
        for key in [key for key in self._wakes if key[0] == model]:
            self.end(*key, "withdrawn")
        self._forget_unfinished(model)

    def _forget_unfinished(self, model: str) -> None:
        self._unfinished = {replica: start for replica, start in self._unfinished.items() if start.model != model}

    def history(self, model: str) -> list[ColdStart]:
        """Return the model's last cold starts, newest first. Blocks: it reads the database."""
        return self._database.cold_starts(model)

    def _record(self, start: ColdStart) -> None:
        self._database.submit(self._database.put_cold_start, start)
        self._database.submit(self._update_usual, start.model)
        previous = 0.0
        # Sorted by time: an engine's moment may precede its replica's.
        for part, moment in sorted(start.parts.items(), key=lambda item: item[1]):
            self._parts.labels(start.model, part).observe(moment - previous)
            previous = moment
        self._total.labels(start.model).observe(start.parts["first_token"])

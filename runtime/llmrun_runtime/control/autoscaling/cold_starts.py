"""Cold starts, with their parts: from the request that found nothing to its first token.

They are stored, and counted for Prometheus.

The ingress knows when it was asked and when the first token came, the replica what happened on its node; all clocks
are of unix time, so between machines a part is as exact as their clocks.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from sqlalchemy.exc import SQLAlchemyError

from llmrun.wire import START_PARTS, ColdStart
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.wire.reports import ReplicaReport

log = logging.getLogger("llmrun.control")
FIRST_TOKEN_S = 60.0
# Seconds; to 30 minutes, which a large model's first start on a node may take.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800)
Outcome = Literal["ready", "failed", "withdrawn"]
OUTCOMES: tuple[Outcome, ...] = ("ready", "failed", "withdrawn")


class ColdStarts:
    """The wakes that are under way, and where they are noted when they have ended well."""

    def __init__(self, database: Database, metrics: CollectorRegistry) -> None:
        self._database = database
        self._wakes: dict[tuple[str, int], tuple[float, float]] = {}
        self._open: dict[str, ColdStart] = {}
        self._usual: dict[str, float] = {}
        self._ended = Counter("llmrun_wakes", "Wakes that have ended, and how.", ("model", "outcome"), registry=metrics)
        self._parts = Histogram(
            "llmrun_cold_start_part_seconds",
            "How long each part of a cold start took.",
            ("model", "part"),
            registry=metrics,
            buckets=BUCKETS,
        )
        self._whole = Histogram(
            "llmrun_cold_start_seconds",
            "From the request that found no replica to its first token.",
            ("model",),
            registry=metrics,
            buckets=BUCKETS,
        )

    def decided(self, model: str, version: int, asked: float) -> None:
        """A model at zero gets a target, because somebody has been waiting since `asked` (unix time)."""
        self._wakes.setdefault((model, version), (asked, time.time()))

    def over(self, model: str, version: int, outcome: Outcome) -> tuple[float, float] | None:
        """The wake that has ended so: when it was asked for, and decided; None if there was none."""
        wake = self._wakes.pop((model, version), None)
        if wake:
            self._ended.labels(model, outcome).inc()
        return wake

    def known(self, models: Iterable[str]) -> None:
        """There are these: what has not happened to one of them is 0, or its first time would be no increase."""
        for model in models:
            for outcome in OUTCOMES:
                self._ended.labels(model, outcome)
            for part in START_PARTS:
                self._parts.labels(model, part)
            self._whole.labels(model)

    def ready(self, report: ReplicaReport) -> None:
        """A replica answers; the first one since a wake has ended it."""
        wake = self.over(report.model, report.version, "ready")
        if not wake:
            return
        moments = {**report.moments, "decided": wake[1], "registered": time.time()}
        start = ColdStart(
            model=report.model,
            version=report.version,
            node=report.host,
            forked=report.forked,
            asked=wake[0],
            parts={part: max(0.0, round(moments[part] - wake[0], 3)) for part in START_PARTS if part in moments},
        )
        # Those of this model whose first token nobody waited for are not noted.
        self._open = {replica: other for replica, other in self._open.items() if other.model != report.model}
        self._open[report.id] = start

    def first_tokens(self, moments: Mapping[str, float]) -> None:
        """Requests that had waited have got their first bytes: replica's id → unix time."""
        for replica, moment in moments.items():
            start = self._open.pop(replica, None)
            # Who comes much later has not waited for this start.
            if start and moment - start.asked - start.parts["registered"] < FIRST_TOKEN_S:
                parts = {**start.parts, "first_token": max(0.0, round(moment - start.asked, 3))}
                self._note(start.model_copy(update={"parts": parts}))

    def usual(self, model: str) -> float:
        """The median of the last ones, in seconds; 0 where there were none."""
        if model not in self._usual:
            self._look_up(model)
        return self._usual.get(model, 0.0)

    def _look_up(self, model: str) -> None:
        try:
            times = [start.parts["first_token"] for start in self.of(model)]
        except SQLAlchemyError:  # models are served without it
            log.exception("the cold starts of %s cannot be read", model)
            times = []
        self._usual[model] = round(statistics.median(times), 1) if times else self._usual.get(model, 0.0)

    def forget(self, model: str) -> None:
        """The model is gone."""
        self._usual.pop(model, None)
        for key in [key for key in self._wakes if key[0] == model]:
            self.over(*key, "withdrawn")
        self._open = {replica: start for replica, start in self._open.items() if start.model != model}

    def of(self, model: str) -> list[ColdStart]:
        """The last ones, the newest first."""
        return self._database.starts(model)

    def _note(self, start: ColdStart) -> None:
        try:
            self._database.put_start(start)
        except SQLAlchemyError:
            log.exception("a cold start of %s cannot be stored", start.model)
        self._look_up(start.model)
        before = 0.0
        # In the order of time: an engine may be ahead of its replica.
        for part, when in sorted(start.parts.items(), key=lambda item: item[1]):
            self._parts.labels(start.model, part).observe(when - before)
            before = when
        self._whole.labels(start.model).observe(start.parts["first_token"])

"""The counts of one engine that control has not acknowledged yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrun_runtime.wire.reports import ReplicaReport
from llmrun_runtime.wire.usage import PaceRow, Row


class UnreportedCounts:
    """Rows of usage and of times per output token. A row has totals, so one that arrives twice counts once."""

    def __init__(self) -> None:
        self.since = 0
        """The number of the last state of the engine that was added; the engine then sends only what changed later."""
        self._usage: dict[tuple[str, str], Row] = {}
        self._paces: dict[str, PaceRow] = {}
        self._acknowledged_paces: dict[str, PaceRow] = {}

    def add(self, state: Mapping[str, Any]) -> None:
        """Add the rows of an engine's state, unless a later state overtook it: that one had them all."""
        if state["number"] <= self.since:
            return
        self.since = state["number"]
        self._usage |= {(row[0], row[1]): tuple(row) for row in state["usage"]}
        self._paces |= {row[0]: tuple(row) for row in state["paces"]}

    def usage(self) -> tuple[Row, ...]:
        """Return the rows of usage for the next report."""
        return tuple(self._usage.values())

    def paces(self) -> tuple[tuple[PaceRow, PaceRow | None], ...]:
        """Return the rows of times per output token, each with the last one that control has acknowledged."""
        return tuple((row, self._acknowledged_paces.get(adapter)) for adapter, row in self._paces.items())

    def acknowledge(self, report: ReplicaReport) -> None:
        """Drop the rows of a report that control has received, unless they have changed since."""
        for row in report.usage:
            if self._usage.get(row[:2]) == row:
                del self._usage[row[:2]]
        for pace, _ in report.paces:
            self._acknowledged_paces[pace[0]] = pace
            if self._paces.get(pace[0]) == pace:
                del self._paces[pace[0]]

"""What was used, by day, key, model and adapter: added up from replicas' reports, stored every few seconds.

A replica's counts grow from its engine's start; what of them is stored already is stored beside, in one transaction, so
that a restart of control counts nothing twice and loses nothing that a replica can still tell.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from sqlalchemy import delete, func, select
from sqlalchemy.exc import SQLAlchemyError

from llmrun.wire import UsageLine
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.tables import CountedRow, UsageRow
from llmrun_runtime.rate_window import RateWindow
from llmrun_runtime.wire.reports import ReplicaReport, key_subject, model_subject
from llmrun_runtime.wire.usage import Row

log = logging.getLogger("llmrun.control")
FLUSH_S = 2.0
# Who has not reported for so long will not.
ABSENT_S = 300.0
COUNTS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
Where = tuple[str, str, str, str]
"""Day, key, model, adapter."""


class Usage:
    """The sums that are not stored yet, and the tokens of the last minute by subject (`reports.Subject`)."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[str, dict[tuple[str, str], tuple[int, ...]]] = {}
        self._changed: set[str] = set()
        self._gone: set[str] = set()
        self._new: dict[Where, list[float]] = {}
        self._tokens: dict[str, RateWindow] = {}
        self.on_new: Callable[[str, str, Sequence[int]], None] = lambda model, adapter, counts: None
        """Called with what is new of each row of a report: COUNTS by model and adapter."""

    def load(self) -> None:
        """Read what of living replicas is stored."""
        with self._database.session() as session:
            for row in session.scalars(select(CountedRow)):
                self._seen[row.replica] = {(key, adapter): tuple(c) for key, adapter, *c in json.loads(row.counts)}

    def report(self, report: ReplicaReport, now: float) -> None:
        """Add what is new in a replica's report."""
        seen = self._seen.setdefault(report.id, {})
        for row in report.usage:
            self._add(report, row, seen, now)

    def _add(self, report: ReplicaReport, row: Row, seen: dict[tuple[str, str], tuple[int, ...]], now: float) -> None:
        key, adapter, *counts = row
        before = seen.get((key, adapter), (0,) * len(COUNTS))
        # A replica that started its engine anew counts from zero again.
        new = [c - b for c, b in zip(counts, before, strict=True)]
        new = new if min(new) >= 0 else counts
        seen[key, adapter] = tuple(counts)
        self._changed.add(report.id)
        sums = self._new.setdefault((_today(), key, report.model, adapter), [0.0] * (len(COUNTS) + 1))
        for place, amount in enumerate(new):
            sums[place] += amount
        self.on_new(report.model, adapter, new)
        if tokens := new[1] + new[2]:
            for subject in ([key_subject(key)] if key else []) + [model_subject(report.model)]:
                self._tokens.setdefault(subject, RateWindow()).add(now, tokens)

    def gone(self, replica: str) -> None:
        """A replica has ended."""
        if self._seen.pop(replica, None) is not None:
            self._changed.discard(replica)
            self._gone.add(replica)

    def gpus(self, model: str, gpus: float, seconds: float) -> None:
        """A model's replicas have held so many GPUs for so long."""
        if gpus:
            self._new.setdefault((_today(), "", model, ""), [0.0] * (len(COUNTS) + 1))[-1] += gpus * seconds

    def tokens(self, subject: str, limit: int, now: float) -> tuple[int, float]:
        """A subject's tokens of the last minute, and the seconds until they are below `limit`."""
        window = self._tokens.get(subject)
        return (window.total(now), window.wait(now, limit)) if window else (0, 0)

    async def run(self, living: Callable[[], Iterable[tuple[str, str, float]]]) -> None:
        """Store every FLUSH_S, for ever. `living`: replicas that live now, each with its model and its GPUs."""
        absent, look_at, before = set[str](), 0.0, time.monotonic()
        while True:
            await asyncio.sleep(FLUSH_S)
            now = time.monotonic()
            replicas = list(living())
            for _, model, gpus in replicas:
                self.gpus(model, gpus, now - before)
            before = now
            if now >= look_at:  # those that ended while control was away
                look_at, missing = now + ABSENT_S, self._seen.keys() - {replica for replica, _, _ in replicas}
                for replica in missing & absent:
                    self.gone(replica)
                absent = missing
            await self.flush()

    async def flush(self) -> None:
        """Store what is new; what cannot be stored is tried again with the next."""
        new, self._new = self._new, {}
        changed, self._changed = self._changed, set()
        gone, self._gone = self._gone, set()
        if not (new or changed or gone):
            return
        counted = {replica: [[*key, *counts] for key, counts in self._seen[replica].items()] for replica in changed}
        try:
            await asyncio.to_thread(self._store, new, counted, gone)
        except SQLAlchemyError:
            log.exception("what was used cannot be stored; tried again")
            self._changed |= changed & self._seen.keys()
            self._gone |= gone
            for where, sums in new.items():
                later = self._new.setdefault(where, [0.0] * len(sums))
                self._new[where] = [a + b for a, b in zip(later, sums, strict=True)]

    def _store(self, new: dict[Where, list[float]], counted: dict[str, list[list[object]]], gone: set[str]) -> None:
        with self._database.session() as session, session.begin():
            for where, sums in new.items():
                row = session.get(UsageRow, where)
                if not row:
                    row = UsageRow(**dict(zip(("day", "key", "model", "adapter"), where, strict=True)))
                    for name in (*COUNTS, "gpu_seconds"):
                        setattr(row, name, 0)
                    session.add(row)
                for name, amount in zip(COUNTS, sums, strict=False):
                    setattr(row, name, getattr(row, name) + int(amount))
                row.gpu_seconds += sums[-1]
            for replica, counts in counted.items():
                session.merge(CountedRow(replica=replica, counts=json.dumps(counts)))
            session.execute(delete(CountedRow).where(CountedRow.replica.in_(gone)))

    def lines(self, by: Iterable[str], since: str) -> list[UsageLine]:
        """The sums from the day `since` on, told apart by `by` (of day, key, model, adapter)."""
        columns = [getattr(UsageRow, name) for name in by]
        sums = [func.sum(getattr(UsageRow, name)).label(name) for name in (*COUNTS, "gpu_seconds")]
        with self._database.session() as session:
            rows = session.execute(
                select(*columns, *sums).where(UsageRow.day >= since).group_by(*columns).order_by(*columns)
            )
            return [UsageLine.model_validate({k: v for k, v in row._mapping.items() if v is not None}) for row in rows]


def _today() -> str:
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d")

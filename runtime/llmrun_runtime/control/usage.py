"""Adds up usage by day, key, model and adapter from the replicas' reports, and stores it every few seconds.

A replica's counts grow from its engine's start. The part that is already added up is stored in the same transaction, so
that a restart of control counts nothing twice and loses nothing that a replica still reports.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from llmrun.wire import UsageLine
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.tables import CountedRow, UsageRow
from llmrun_runtime.rate_window import RateWindow
from llmrun_runtime.wire.reports import ReplicaReport, Subject, key_subject, model_subject
from llmrun_runtime.wire.usage import Row

log = logging.getLogger("llmrun.control")
FLUSH_S = 2.0
# Replicas that are not registered in two checks at this interval have ended.
ABSENCE_CHECK_S = 300.0
KEEP_DAYS = 400
MERGE_OLD_S = 86400.0
COUNTS = ("requests", "prompt_tokens", "completion_tokens", "cached_tokens")
Group = tuple[str, str, str, str]
"""Day, key, model, adapter."""


class Usage:
    """The sums that are not stored yet, and each subject's tokens of the last minute."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counted: dict[str, dict[tuple[str, str], tuple[int, ...]]] = {}
        """By replica, the counts already added up, by key and adapter."""
        self._changed: set[str] = set()
        self._ended: set[str] = set()
        self._sums: dict[Group, list[float]] = {}
        self._tokens: dict[Subject, RateWindow] = {}
        self._next_merge = 0.0
        self.on_new: Callable[[str, str, Sequence[int]], None] = lambda model, adapter, counts: None
        """Called with the new part of each row of a report: model, adapter, COUNTS."""

    def load(self) -> None:
        """Read the counts of replicas that earlier reports were added up for."""
        with self._database.session() as session:
            for row in session.scalars(select(CountedRow)):
                try:
                    counts = {(key, adapter): _counts(numbers) for key, adapter, *numbers in json.loads(row.counts)}
                except (TypeError, ValueError) as error:
                    log.warning(
                        "the usage of replica %s is counted again: its row cannot be read: %s", row.replica, error
                    )
                    continue
                self._counted[row.replica] = counts

    def report(self, report: ReplicaReport, now: float) -> None:
        """Add the new part of a replica's counts; `now` is monotonic."""
        counted = self._counted.setdefault(report.id, {})
        for row in report.usage:
            self._add(report, row, counted, now)

    def _add(
        self, report: ReplicaReport, row: Row, counted: dict[tuple[str, str], tuple[int, ...]], now: float
    ) -> None:
        key, adapter, *numbers = row
        counts = _counts(numbers)
        previous = counted.get((key, adapter), (0,) * len(COUNTS))
        new = tuple(count - old for count, old in zip(counts, previous, strict=True))
        new = new if min(new) >= 0 else counts  # the replica restarted its engine, which counts from zero
        counted[key, adapter] = counts
        self._changed.add(report.id)
        sums = self._sums.setdefault((_today(), key, report.model, adapter), [0.0] * (len(COUNTS) + 1))
        for index, amount in enumerate(new):
            sums[index] += amount
        self.on_new(report.model, adapter, new)
        if tokens := new[1] + new[2]:
            for subject in ([key_subject(key)] if key else []) + [model_subject(report.model)]:
                self._tokens.setdefault(subject, RateWindow()).add(now, tokens)

    def forget(self, replica: str) -> None:
        """Drop the counts of a replica that has ended."""
        if self._counted.pop(replica, None) is not None:
            self._changed.discard(replica)
            self._ended.add(replica)

    def add_gpu_seconds(self, model: str, gpus: float, seconds: float) -> None:
        """Add the time for which a replica of the model reserved GPUs."""
        if gpus:
            self._sums.setdefault((_today(), "", model, ""), [0.0] * (len(COUNTS) + 1))[-1] += gpus * seconds

    def tokens(self, subject: Subject, limit: int, now: float) -> tuple[int, float]:
        """Return a subject's tokens of the last minute, and the seconds until they are below `limit`."""
        window = self._tokens.get(subject)
        return (window.total(now), window.wait(now, limit)) if window else (0, 0)

    def forget_unused(self, now: float) -> None:
        """Drop the subjects without tokens in the last minute: keys are revoked, models deleted."""
        self._tokens = {subject: window for subject, window in self._tokens.items() if window.total(now)}

    async def run(self, live_replicas: Callable[[], Iterable[tuple[str, str, float]]]) -> None:
        """Flush every FLUSH_S. Never returns. `live_replicas` returns replicas, their models and their GPUs."""
        absent, next_check, previous = set[str](), 0.0, time.monotonic()
        while True:
            await asyncio.sleep(FLUSH_S)
            now = time.monotonic()
            replicas = list(live_replicas())
            for _, model, gpus in replicas:
                self.add_gpu_seconds(model, gpus, now - previous)
            previous = now
            if now >= next_check:  # for replicas that ended while control was down
                next_check = now + ABSENCE_CHECK_S
                missing = self._counted.keys() - {replica for replica, _, _ in replicas}
                for replica in missing & absent:
                    self.forget(replica)
                absent = missing
                self.forget_unused(now)
            await self.flush()

    async def flush(self) -> None:
        """Store the new sums. If that fails, they are stored with the next ones. Merges old days once a day."""
        if time.monotonic() >= self._next_merge:
            self._next_merge = time.monotonic() + MERGE_OLD_S
            try:
                await self._database.run(self.merge_old_days)
            except SQLAlchemyError:
                log.exception("could not merge the usage of old days, retrying in a day")
        sums, self._sums = self._sums, {}
        changed, self._changed = self._changed, set()
        ended, self._ended = self._ended, set()
        if not (sums or changed or ended):
            return
        counted = {replica: [[*key, *counts] for key, counts in self._counted[replica].items()] for replica in changed}
        try:
            await self._database.run(self._store, sums, counted, ended)
        except SQLAlchemyError:
            log.exception("could not store usage, retrying")
            self._changed |= changed & self._counted.keys()
            self._ended |= ended
            for group, amounts in sums.items():
                later = self._sums.setdefault(group, [0.0] * len(amounts))
                self._sums[group] = [a + b for a, b in zip(later, amounts, strict=True)]

    def _store(self, sums: dict[Group, list[float]], counted: dict[str, list[list[object]]], ended: set[str]) -> None:
        with self._database.session() as session, session.begin():
            for group, amounts in sums.items():
                _add_to_row(session, group, amounts)
            for replica, counts in counted.items():
                session.merge(CountedRow(replica=replica, counts=json.dumps(counts)))
            session.execute(delete(CountedRow).where(CountedRow.replica.in_(ended)))

    def merge_old_days(self) -> None:
        """Add the rows that are older than KEEP_DAYS to those of their month's first day."""
        oldest = (date.fromisoformat(_today()) - timedelta(days=KEEP_DAYS)).isoformat()
        old = (UsageRow.day < oldest) & UsageRow.day.not_like("%-01")
        group = (func.substr(UsageRow.day, 1, 7), UsageRow.key, UsageRow.model, UsageRow.adapter)
        sums = [func.sum(getattr(UsageRow, name)) for name in (*COUNTS, "gpu_seconds")]
        with self._database.session() as session, session.begin():
            merged = session.execute(select(*group, *sums).where(old).group_by(*group)).all()
            for month, key, model, adapter, *amounts in merged:
                _add_to_row(session, (f"{month}-01", key, model, adapter), amounts)
            session.execute(delete(UsageRow).where(old))

    def lines(self, by: Iterable[str], since: str) -> list[UsageLine]:
        """Return the sums from the day `since` on, grouped by `by` (any of day, key, model, adapter). Blocks."""
        columns = [getattr(UsageRow, name) for name in by]
        sums = [func.sum(getattr(UsageRow, name)).label(name) for name in (*COUNTS, "gpu_seconds")]
        with self._database.session() as session:
            rows = session.execute(
                select(*columns, *sums).where(UsageRow.day >= since).group_by(*columns).order_by(*columns)
            )
            return [UsageLine.model_validate({k: v for k, v in row._mapping.items() if v is not None}) for row in rows]


def _counts(numbers: Sequence[int]) -> tuple[int, ...]:
    """Return a row's numbers as COUNTS: another release may report more of them, or fewer."""
    return (*numbers[: len(COUNTS)], *(0,) * (len(COUNTS) - len(numbers)))


def _add_to_row(session: Session, group: Group, amounts: Sequence[float]) -> None:
    row = session.get(UsageRow, group)
    if not row:
        row = UsageRow(**dict(zip(("day", "key", "model", "adapter"), group, strict=True)))
        for name in (*COUNTS, "gpu_seconds"):
            setattr(row, name, 0)
        session.add(row)
    for name, amount in zip(COUNTS, amounts, strict=False):
        setattr(row, name, getattr(row, name) + int(amount))
    row.gpu_seconds += amounts[-1]


def _today() -> str:
    return datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d")

"""A replica's calls to control."""

from __future__ import annotations

import asyncio
import functools
from types import SimpleNamespace
from typing import Any

from llmrun_runtime.actors import ControlClient
from llmrun_runtime.replica.deployment import Replica
from llmrun_runtime.replica.unreported_counts import UnreportedCounts
from llmrun_runtime.wire.reports import LEASE_S
from tests.support.factories import report


async def test_a_lost_report_is_followed_by_another_one_before_the_lease_ends() -> None:
    control = ControlClient()
    control._handle = SimpleNamespace(
        report=SimpleNamespace(remote=lambda *_: asyncio.get_running_loop().create_future())
    )
    replica: Any = SimpleNamespace(_control=control, _make_report=report)
    replica._call_control = functools.partial(Replica._call_control, replica)
    async with asyncio.timeout(LEASE_S / 2):
        await Replica._report(replica)


def counts(number: int, *usage: tuple[Any, ...]) -> dict[str, Any]:
    """Return an engine's state."""
    return {"number": number, "usage": [list(row) for row in usage], "paces": []}


def test_counts_stay_until_control_has_acknowledged_them() -> None:
    unreported = UnreportedCounts()
    unreported.add(counts(1, ("a", "", 1, 1, 1, 0), ("b", "", 1, 1, 1, 0)))
    sent = report(usage=unreported.usage())
    unreported.add(counts(3, ("a", "", 2, 2, 2, 0)))
    unreported.add(counts(2, ("a", "", 1, 1, 1, 0)))  # it was overtaken
    unreported.acknowledge(sent)
    assert unreported.usage() == (("a", "", 2, 2, 2, 0),) and unreported.since == 3, "it changed while it was sent"
    unreported.acknowledge(report(usage=unreported.usage()))
    assert unreported.usage() == ()


async def test_a_replica_reports_until_its_engine_has_ended() -> None:
    """Control ends replicas that are silent for 20 s, and the end of an engine can take longer."""
    reporting_at_the_end: list[bool] = []

    async def forever() -> None:
        await asyncio.Event().wait()

    async def done(*_: Any, timeout: float = 0) -> None:
        pass

    async def end_engine() -> None:
        reporting_at_the_end.append(not replica._reporting.done())

    replica: Any = SimpleNamespace(_state="starting", _failed="", _write_line=lambda _: None, _make_report=report)
    replica._starting, replica._reporting = asyncio.create_task(forever()), asyncio.create_task(forever())
    replica._report = replica._call_control = done
    replica._end_engine = end_engine
    await asyncio.sleep(0)
    await Replica.__del__(replica)
    assert reporting_at_the_end == [True]
    assert replica._starting.cancelled() and replica._reporting.cancelled()

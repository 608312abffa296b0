"""A replica's calls to control."""

from __future__ import annotations

import asyncio
import functools
from types import SimpleNamespace
from typing import Any

from llmrun_runtime.replica.deployment import Replica
from llmrun_runtime.wire.reports import LEASE_S
from tests.support.factories import report


async def test_a_lost_report_is_followed_by_another_one_before_the_lease_ends() -> None:
    unanswered = SimpleNamespace(remote=lambda *_: asyncio.get_running_loop().create_future())
    replica: Any = SimpleNamespace(_control=SimpleNamespace(report=unanswered), _make_report=report)
    replica._call_control = functools.partial(Replica._call_control, replica)
    async with asyncio.timeout(LEASE_S / 2):
        await Replica._report(replica)

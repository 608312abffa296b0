"""Draining: an engine is stopped only after it has been idle for a while, and no request is lost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from llmrun_runtime.asgi import Message, send_json
from llmrun_runtime.engines.base import SHIM_ENV, TOKEN_ENV, ShimConfig
from llmrun_runtime.engines.shim.middleware import Shim
from llmrun_runtime.replica import drain
from llmrun_runtime.replica.drain import wait_until_drained
from llmrun_runtime.wire.headers import GONE_HEADER, LEAVE_PATH, TOKEN_HEADER
from tests.support.ingress import Bench, Engine, route


class Counts:
    """An engine that reports these counts and repeats the last; each response may block the whole process."""

    def __init__(self, counts: Sequence[int | None], blocked_s: float = 0) -> None:
        self.counts, self.leave_calls, self._blocked_s = list(counts), list[bool](), blocked_s

    async def __call__(self, leave: bool) -> int | None:
        self.leave_calls.append(leave)
        count = self.counts[0] if len(self.counts) == 1 else self.counts.pop(0)
        time.sleep(self._blocked_s)  # noqa: ASYNC251 - simulates a process that gets no CPU time
        return count


async def test_an_engine_that_stays_idle_is_drained() -> None:
    engine = Counts([1, 0, None, 0])
    started = time.monotonic()
    assert await wait_until_drained(engine, 5, linger=0.3) == ""
    assert time.monotonic() - started > 0.6, "a missing response counts as busy and restarts the idle time"
    assert engine.leave_calls[-1] and not any(engine.leave_calls[:-1])


async def test_an_engine_that_gets_no_more_requests_need_not_linger() -> None:
    engine = Counts([0])
    assert await wait_until_drained(engine, 5, linger=0) == ""
    assert engine.leave_calls == [True], "it refuses requests of an ingress that is late"


async def test_a_delayed_process_does_not_stop_a_busy_engine() -> None:
    """Elapsed time since the last poll once counted as idle time, and stopped an engine that had a request."""
    engine = Counts([1, 1, 0, 1, 0], blocked_s=0.15)
    assert await wait_until_drained(engine, 10, linger=0.1) == ""
    assert engine.leave_calls == [False, False, False, True, False, True], (
        "the leave request follows only a report of an idle engine"
    )


async def test_draining_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "still in flight after 0.3 s (LLMRUN_DRAIN_TIMEOUT)" in await wait_until_drained(Counts([1]), 0.3)
    monkeypatch.setattr(drain, "UNRESPONSIVE_S", 0.2)
    assert "has not responded for 0.2 s" in await wait_until_drained(Counts([None]), 5)


async def get(shim: Shim, path: str) -> tuple[int, dict[str, str]]:
    """Return the status and headers of a response."""
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [(TOKEN_HEADER.encode(), b"t")], "app": None}
    await shim(scope, None, send)  # type: ignore[arg-type]
    return messages[0]["status"], {key.decode(): value.decode() for key, value in messages[0]["headers"]}


async def test_an_idle_engine_rejects_requests_after_a_leave_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "t")
    monkeypatch.setenv(SHIM_ENV, ShimConfig(model="m").to_json())
    during: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        during.append(await get(shim, LEAVE_PATH))  # while this request is in flight
        await send_json(send, 200, {})

    shim = Shim(app)
    assert (await get(shim, "/v1/completions"))[0] == 200 and during[0][0] == 200
    assert (await get(shim, "/v1/completions"))[0] == 200, "it was busy at the first leave request"
    assert (await get(shim, LEAVE_PATH))[0] == 200
    status, headers = await get(shim, "/v1/completions")
    assert status == 503 and headers[GONE_HEADER] == "1" and len(during) == 2
    assert (await get(shim, "/metrics"))[0] == 200


async def test_a_late_request_goes_to_another_replica(bench: Bench, engine: Engine) -> None:
    async with Engine().running() as ending:
        ending.shutting_down = True
        bench.table(route(ending.port, engine.port))
        answers = [await bench.post({"model": "one", "prompt": str(number)}) for number in range(4)]
    assert [status for status, _, _ in answers] == [200] * 4
    assert len(engine.requests) == 4 and ending.requests

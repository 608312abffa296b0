"""When an engine may be ended: nothing in flight for a while by its own word, and no request lost at the very end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from llmrun_runtime.asgi import Message, answer
from llmrun_runtime.engines.base import SHIM_ENV, TOKEN_ENV, ShimConfig
from llmrun_runtime.engines.shim.middleware import Shim
from llmrun_runtime.replica import drain
from llmrun_runtime.replica.drain import drained
from llmrun_runtime.wire.headers import GONE_HEADER, LEAVE_PATH, TOKEN_HEADER
from tests.support.ingress import Bench, Engine, route


class Counts:
    """An engine that says these counts, the last one for ever; each answer may hold this whole process up."""

    def __init__(self, counts: Sequence[int | None], held_up: float = 0) -> None:
        self.counts, self.asked, self._held_up = list(counts), list[bool](), held_up

    async def __call__(self, leave: bool) -> int | None:
        self.asked.append(leave)
        count = self.counts[0] if len(self.counts) == 1 else self.counts.pop(0)
        time.sleep(self._held_up)  # noqa: ASYNC251 - a process that gets no processor
        return count


async def test_an_engine_is_left_when_it_has_been_quiet_and_takes_no_more() -> None:
    engine = Counts([1, 0, None, 0])
    begun = time.monotonic()
    assert await drained(engine, 5, linger=0.3) == ""
    assert time.monotonic() - begun > 0.6, "no answer is as good as a request: the quiet begins anew"
    assert engine.asked[-1] and not any(engine.asked[:-1])


async def test_a_process_that_is_held_up_takes_no_request_for_over() -> None:
    """What took a request down with its engine: time had passed since the last look, and that alone was the quiet."""
    engine = Counts([1, 1, 0, 1, 0], held_up=0.15)
    assert await drained(engine, 10, linger=0.1) == ""
    assert engine.asked == [False, False, False, True, False, True], "told to leave only after it has said it is idle"


async def test_what_is_in_flight_for_too_long_or_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "in flight after 0.3 s (LLMRUN_DRAIN_TIMEOUT)" in await drained(Counts([1]), 0.3)
    monkeypatch.setattr(drain, "SILENT_S", 0.2)
    assert "has not answered for 0.2 s" in await drained(Counts([None]), 5)


async def told(shim: Shim, path: str) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    heard: list[Message] = []

    async def send(message: Message) -> None:
        heard.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [(TOKEN_HEADER.encode(), b"t")], "app": None}
    await shim(scope, None, send)  # type: ignore[arg-type]
    return heard[0]["status"], {key.decode(): value.decode() for key, value in heard[0]["headers"]}


async def test_an_engine_that_is_idle_takes_no_more_once_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_ENV, "t")
    monkeypatch.setenv(SHIM_ENV, ShimConfig(model="m").to_json())
    within: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        within.append(await told(shim, LEAVE_PATH))  # while it is in flight
        await answer(send, 200, {})

    shim = Shim(app)
    assert (await told(shim, "/v1/completions"))[0] == 200 and within[0][0] == 200
    assert (await told(shim, "/v1/completions"))[0] == 200, "it was busy when it was told"
    assert (await told(shim, LEAVE_PATH))[0] == 200
    status, headers = await told(shim, "/v1/completions")
    assert status == 503 and headers[GONE_HEADER] == "1" and len(within) == 2
    assert (await told(shim, "/metrics"))[0] == 200


async def test_a_request_that_comes_at_the_very_end_goes_to_another_replica(bench: Bench, engine: Engine) -> None:
    async with Engine().running() as ending:
        ending.leaving = True
        bench.table(route(ending.port, engine.port))
        answers = [await bench.ask({"model": "one", "prompt": str(number)}) for number in range(4)]
    assert [status for status, _, _ in answers] == [200] * 4
    assert len(engine.asked) == 4 and ending.asked

"""What a server sends after its engine has ended is not taken for an answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmrun_runtime.asgi import Message
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.engines.shim.engine_guard import EngineEndedError, guarded
from llmrun_runtime.wire.headers import DIED, GONE_HEADER
from tests.support.ingress import Bench, Engine, route

START: Message = {"type": "http.response.start", "status": 200, "headers": []}


class Server:
    """An app whose engine ends before it sends its message number `at`."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.sent: list[Message] = []
        self.ended = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        for number in range(3):
            self.ended = number >= self.at
            body: Message = {"type": "http.response.body", "body": b"%d" % number, "more_body": number < 2}
            await send(body if number else START)

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self) -> None:
        await guarded(self, lambda app: self.ended, {"type": "http", "app": None}, None, self.send)  # type: ignore[arg-type]


async def test_a_living_engine_answers() -> None:
    server = Server(at=3)
    await server.run()
    assert [message.get("body") for message in server.sent] == [None, b"1", b"2"]


async def test_a_response_that_has_not_started_says_that_the_engine_died() -> None:
    server = Server(at=0)
    await server.run()
    start = server.sent[0]
    assert (start["status"], dict(start["headers"])[GONE_HEADER.encode()]) == (503, DIED.encode())
    assert b"the engine died" in server.sent[1]["body"]


@pytest.mark.parametrize("at", [1, 2])
async def test_a_response_that_has_started_does_not_end(at: int) -> None:
    server = Server(at)
    with pytest.raises(EngineEndedError):
        await server.run()
    assert len(server.sent) == at and server.sent[-1].get("more_body", True)


async def test_a_failing_app_is_not_the_engines_end() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        await guarded(app, lambda app: False, {"type": "http"}, None, Server(0).send)  # type: ignore[arg-type]


@pytest.mark.parametrize("started", [False, True])
async def test_an_exception_of_a_dying_engine_is_its_end(started: bool) -> None:
    server = Server(at=9)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if started:
            await send(START)
        server.ended = True
        raise OSError("the socket of the engine is gone")

    run = guarded(app, lambda _: server.ended, {"type": "http"}, None, server.send)  # type: ignore[arg-type]
    if started:
        with pytest.raises(EngineEndedError):
            await run
    else:
        await run
    assert server.sent[0]["status"] == (200 if started else 503)


def test_vllm_tells_when_its_core_has_died() -> None:
    has_ended = get_engine("vllm").has_ended
    assert not has_ended(None) and not has_ended(SimpleNamespace(state=SimpleNamespace()))
    for errored in (True, False):
        client = SimpleNamespace(errored=errored)
        assert has_ended(SimpleNamespace(state=SimpleNamespace(engine_client=client))) is errored


async def test_a_request_that_was_in_a_dying_engine_reaches_no_other_one(bench: Bench, engine: Engine) -> None:
    body = {"model": "one", "prompt": "Hi", "end": True}
    async with Engine().running() as other:
        bench.table(route(engine.port, other.port))
        statuses = [(await bench.post(body))[0]]
        assert len(engine.requests) + len(other.requests) == 1
        bench.table(route((other if engine.requests else engine).port))
        statuses += [(await bench.post(body))[0] for _ in range(2)]
    assert statuses == [503, 500, 500]
    assert len(engine.requests) == len(other.requests) == 1

"""The ingress when engines die, clients stop reading and clocks change."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time

import pytest
from starlette.requests import Request

from llmrun.wire import KeyInfo
from llmrun_runtime import http
from llmrun_runtime.asgi import Message, Send
from llmrun_runtime.ingress.engine_deaths import FORGET_S, MAX_REQUESTS, EngineDeaths
from llmrun_runtime.ingress.error_shapes import ErrorShape
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.queue import keepalive
from llmrun_runtime.ingress.queue.keepalive import DEFAULT_TIMING, KeepaliveStream
from llmrun_runtime.rate_window import RateWindow
from tests.support.ingress import CHAT, CHUNKS, POST_JSON, Bench, Engine, bearer, keys, route, running_ingress

DEADLY = {"model": "one", "die_early": True}


def test_a_rate_window_keeps_one_minute_even_if_nothing_reads_it() -> None:
    window = RateWindow()
    for second in range(20_000):
        window.add(float(second))
    assert len(window._amounts) == 60
    assert window.total(19_999.0) == 60


async def test_limits_do_not_depend_on_the_wall_clock(
    bench: Bench, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.table(route(engine.port), keys=keys(KeyInfo(name="slow", rpm=1)))
    assert (await bench.post(**bearer("slow")))[0] == 200
    now = time.time()
    for clock in (now - 3600, now + 3600):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        status, headers, _ = await bench.post(**bearer("slow"))
        assert status == 429 and 0 < int(headers["retry-after"]) <= 60


async def test_a_request_that_ended_two_engines_is_refused(
    bench: Bench, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    async with Engine().running() as other:
        bench.table(route(engine.port))
        status, headers, answer = await bench.post(DEADLY)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "replica_gone", "5")
        bench.table(route(other.port))
        for identifier in ("second", "third"):
            with caplog.at_level(logging.ERROR, "llmrun.ingress"):
                status, headers, answer = await bench.post(DEADLY, headers={"x-request-id": identifier})
            assert (status, answer["error"]["code"]) == (500, "engine_failed") and "retry-after" not in headers
            assert answer["error"]["message"].startswith("two engines of one died while they ran this request")
            assert f"request {identifier} is refused" in caplog.text
        assert (len(engine.requests), len(other.requests)) == (1, 1)
        assert (await bench.post())[0] == 200
        bench.table(route(other.port, version=2))
        assert (await bench.post(DEADLY))[0] == 503


async def test_equal_requests_in_one_engine_count_as_one_death(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, max_ongoing=20))
    body = {"model": "one", "stall": 60}
    pending = [asyncio.create_task(bench.post(body)) for _ in range(5)]
    while len(engine.requests) < 5:
        await asyncio.sleep(0.01)
    engine.die()
    assert {(await each)[0] for each in pending} == {503}
    async with Engine().running() as other:
        bench.table(route(other.port))
        again = asyncio.create_task(bench.post(body))
        while not other.requests:
            await asyncio.sleep(0.01)
        again.cancel()


async def test_a_request_in_a_replica_that_was_shut_down_is_retried(bench: Bench, engine: Engine) -> None:
    async with Engine().running() as leaving:
        bench.table(route(leaving.port))
        pending = asyncio.create_task(bench.post({"model": "one", "stall": 0.5}))
        while not leaving.requests:
            await asyncio.sleep(0.01)
        bench.table(route(engine.port))
        leaving.die()
        assert (await pending)[0] == 200
        leaving.shutting_down = True
        bench.table(route(leaving.port, engine.port))
        assert (await bench.post())[0] == 200
        assert len(leaving.requests) == 2


def test_deaths_are_bounded_and_forgotten() -> None:
    deaths = EngineDeaths()
    for replica in ("r1", "r1"):
        deaths.add(b"a", replica, 0.0)
    assert not deaths.blocks(b"a", 1.0)
    deaths.add(b"a", "r2", 1.0)
    assert deaths.blocks(b"a", FORGET_S) and not deaths.blocks(b"a", FORGET_S + 1) and not deaths
    deaths.add(b"b", "r1", 0.0)
    deaths.forget(b"b")
    deaths.add(b"b", "r2", 0.0)
    assert not deaths.blocks(b"b", 1.0)
    for number in range(2 * MAX_REQUESTS):
        deaths.add(str(number).encode(), "r1", 2.0)
    assert len(deaths) == MAX_REQUESTS


async def test_a_client_that_stops_reading_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepalive, "WRITE_TIMEOUT_S", 0.5)

    class Endless(Engine):
        async def respond(self, request: Request, send: Send) -> None:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while True:
                await send({"type": "http.response.body", "body": b"data: " + b"x" * 65_530, "more_body": True})
                await asyncio.sleep(0)

    async with Endless().running() as engine, running_ingress() as bench:
        bench.table(route(engine.port))
        host, _, port = bench.url.removeprefix("http://").partition(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=2**16)
        data = json.dumps({"model": "one"}).encode()
        writer.write(f"{POST_JSON}content-length: {len(data)}\r\n\r\n".encode() + data)
        await asyncio.wait_for(engine.client_left.wait(), 10)
        async with asyncio.timeout(1):
            while bench.queue.traffic():
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_a_client_that_reads_slowly_gets_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keepalive, "WRITE_TIMEOUT_S", 0.2)
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        await asyncio.sleep(0.1)
        sent.append(message.get("body", b""))

    stream = KeepaliveStream(send, [], DEFAULT_TIMING, ErrorShape(CHAT, "id"))
    await stream({"type": "http.response.start", "status": 200, "headers": []})
    for chunk in CHUNKS:
        await stream({"type": "http.response.body", "body": chunk, "more_body": True})
    assert sent == [b"", *CHUNKS]


def test_accepted_connections_detect_dead_and_stuck_clients() -> None:
    with http.bind("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == http.UNREAD_TIMEOUT_MS


@pytest.mark.parametrize(
    ("chunks", "end"), [((b"data: 1\n\n",), b"data: {"), ((b"data: 1\n\n", b"data: 2"), b"\n\ndata: {")]
)
async def test_an_error_ends_the_event_that_it_interrupts(chunks: tuple[bytes, ...], end: bytes) -> None:
    sent: list[bytes] = []

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    stream = KeepaliveStream(send, [], DEFAULT_TIMING, ErrorShape(CHAT, "id"))
    await stream.comment("waking")
    for chunk in chunks:
        await stream({"type": "http.response.body", "body": chunk, "more_body": True})
    await stream.fail(HTTPError(504, "timed out", "request_timeout"))
    assert sent[-1].startswith(end)


async def test_a_replica_that_cannot_be_reached_does_not_get_every_request_first(
    bench: Bench, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the fewest requests in flight, so it is the first choice until control removes it."""
    bench.table(route(1, engine.port))  # nothing listens on port 1
    statuses = [(await bench.post({"model": "one", "prompt": str(number)}))[0] for number in range(5)]
    assert statuses == [200] * 5
    assert sum("is unavailable" in record.getMessage() for record in caplog.records) == 1
    bench.table(route(1))
    assert (await bench.post({"model": "one"}, headers={"X-LLMRun-Max-Wait": "0.1"}))[0] == 503

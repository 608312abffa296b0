"""How an ingress ends: refusing new requests, or handing its listening socket to the next one."""

from __future__ import annotations

import asyncio
import time

import aiohttp

from llmrun_runtime import http
from llmrun_runtime.asgi import Receive, Scope, Send, send_json
from llmrun_runtime.ingress.readiness import CONTROL_TIMEOUT_S, Readiness
from llmrun_runtime.wire.reports import Traffic
from tests.support.ingress import CHAT, CHUNKS, Bench, Engine, route


async def test_a_draining_ingress_refuses_new_and_waiting_requests_and_ends_its_streams(
    bench: Bench, engine: Engine
) -> None:
    bench.table(route(engine.port, max_ongoing=1))
    stream = asyncio.create_task(bench.post({"model": "one", "stall": 0.5}))
    while not engine.requests:
        await asyncio.sleep(0.01)
    waiting = asyncio.create_task(bench.post())
    while bench.queue.traffic()["one"].waiting < 1:
        await asyncio.sleep(0.01)
    drain = asyncio.create_task(bench.drain.refuse_new(30))
    status, headers, answer = await waiting
    assert (status, answer["error"]["code"]) == (503, "shutting_down") and not stream.done()
    assert headers["retry-after"] == "5" and headers["connection"] == "close"
    status, headers, answer = await bench.post()
    assert (status, answer["error"]["code"], headers["connection"]) == (503, "shutting_down", "close")
    async with bench.session.get(f"{bench.url}/ready") as response:
        assert response.status == 503 and (await response.json())["checks"]["accepting"] is False
    async with bench.session.get(f"{bench.url}/health") as response:
        assert response.status == 200
    assert bench.drain.remaining == 1
    status, headers, body = await stream
    assert (status, body, headers["connection"]) == (200, b"".join(CHUNKS), "close")
    assert await drain == 0


async def test_a_drain_ends_after_its_timeout(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port))
    stream = asyncio.create_task(bench.post({"model": "one", "hang": True}))
    while not engine.requests:
        await asyncio.sleep(0.01)
    started = time.monotonic()
    assert await bench.drain.refuse_new(0.2) == 1 and time.monotonic() - started < 1
    stream.cancel()
    await asyncio.gather(stream, return_exceptions=True)


async def test_connections_move_to_the_next_ingress_without_an_error(bench: Bench, engine: Engine) -> None:
    bench.table(route(engine.port, max_ongoing=100))

    async def next_app(scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"next": True})

    answers: list[int] = []
    moved: set[int] = set()

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        # POST: aiohttp would send a GET again by itself after a closed connection.
        while number not in moved:
            async with session.post(bench.url + CHAT, json={"model": "one", "stall": 0.02 * (number % 3)}) as response:
                body = await response.read()
                answers.append(response.status)
                if b"next" in body:
                    moved.add(number)

    clients = [aiohttp.ClientSession() for _ in range(20)]
    tasks = [asyncio.create_task(client(number, session)) for number, session in enumerate(clients)]
    while len(answers) < 40:
        await asyncio.sleep(0.01)
    following = asyncio.create_task(http.HTTPServer(next_app).serve([bench.socket.dup()]))
    await asyncio.sleep(0)
    assert await asyncio.wait_for(bench.drain.hand_over(30, linger=0.5), 20) == 0
    await asyncio.wait_for(asyncio.gather(*tasks), 20)
    assert len(moved) == 20 and set(answers) == {200}
    for session in clients:
        await session.close()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_requests_for_a_cold_model_continue_to_wait_during_a_handover(bench: Bench, engine: Engine) -> None:
    bench.table(route(state="waking"))
    waiting = asyncio.create_task(bench.post())
    while bench.queue.traffic().get("one", Traffic()).waiting < 1:
        await asyncio.sleep(0.01)
    drain = asyncio.create_task(bench.drain.hand_over(30, linger=0.1))
    await asyncio.sleep(0.3)
    assert not drain.done()
    bench.table(route(engine.port))
    assert (await waiting)[0] == 200
    assert await asyncio.wait_for(drain, 10) == 0


def test_readiness_names_the_check_that_fails() -> None:
    readiness = Readiness()
    assert readiness.report(0)[1]["checks"] == {"routing_table": False, "control": False, "accepting": True}
    readiness.heard(1)
    assert readiness.report(2) == (
        200,
        {"status": "ready", "checks": {"routing_table": True, "control": True, "accepting": True}},
    )
    status, body = readiness.report(2 + CONTROL_TIMEOUT_S)
    assert (status, body["status"], body["checks"]["control"]) == (503, "not_ready", False)
    readiness.heard(100)
    readiness.draining = True
    assert readiness.report(100)[1]["checks"] == {"routing_table": True, "control": True, "accepting": False}

"""What the bodies of requests can cost the ingress: bytes and time."""

from __future__ import annotations

import asyncio
import json

import pytest

from llmrun.wire import KeyInfo
from llmrun_runtime.ingress.admission.held_bytes import HeldBytes
from tests.support.ingress import CHAT, POST_JSON, Bench, Engine, bearer, keys, route, running_ingress

LARGE = {"model": "one", "prompt": "x" * 300_000}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[HeldBytes]:
    """The budgets of all ingresses that start."""
    made: list[HeldBytes] = []
    original = HeldBytes.__init__

    def record(self: HeldBytes, maximum: int) -> None:
        original(self, maximum)
        made.append(self)

    monkeypatch.setattr(HeldBytes, "__init__", record)
    return made


async def until_waiting(bench: Bench, count: int) -> None:
    async with asyncio.timeout(5):
        while not bench.queue.traffic() or bench.queue.traffic()["one"].waiting < count:
            await asyncio.sleep(0.01)


async def test_waiting_bodies_are_bounded_by_key_and_in_total(held: list[HeldBytes], engine: Engine) -> None:
    all_keys = keys(*(KeyInfo(name=name) for name in ("a", "b", "c")))
    async with running_ingress(max_held_bytes=700_000, wake_timeout=20) as bench:
        bench.table(route(state="waking"), keys=all_keys)
        waiting = [asyncio.create_task(bench.post(LARGE, **bearer(key))) for key in ("a", "b")]
        await until_waiting(bench, 2)
        assert held[0].total > 600_000
        for key, expected in (("a", (429, "key_bytes_exceeded")), ("c", (503, "ingress_full"))):
            status, headers, answer = await bench.post(LARGE, **bearer(key))
            assert (status, answer["error"]["code"]) == expected and headers["retry-after"]
        bench.table(route(engine.port), keys=all_keys)
        assert [(await each)[0] for each in waiting] == [200, 200]
        assert held[0].total == 0 and not held[0].by_key


async def test_a_body_is_let_go_at_the_first_byte_of_the_response(held: list[HeldBytes], engine: Engine) -> None:
    async with running_ingress() as bench:
        bench.table(route(engine.port))
        answer = await bench.session.post(bench.url + CHAT, json=LARGE | {"hang": True})
        await answer.content.readany()
        assert bench.queue.traffic()["one"].in_flight == 1 and held[0].total == 0
        answer.close()


@pytest.mark.parametrize("pause", [0.05, 5])
async def test_a_slow_upload_times_out(pause: float, held: list[HeldBytes], engine: Engine) -> None:
    """One byte at a time, or none at all."""
    async with running_ingress(body_timeout=0.4) as bench:
        bench.table(route(engine.port))
        host, _, port = bench.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"{POST_JSON}content-length: 1000\r\n\r\n".encode())

        async def dribble() -> None:
            while True:
                writer.write(b" ")
                await asyncio.sleep(pause)

        dribbling = asyncio.create_task(dribble())
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 3)
        assert head.startswith(b"HTTP/1.1 408") and b"connection: close" in head
        assert json.loads(await reader.read())["error"]["code"] == "body_timeout"
        dribbling.cancel()
        writer.transport.abort()
        assert held[0].total == 0


async def test_a_client_that_leaves_while_it_uploads_is_no_error(
    bench: Bench, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    bench.table(route(engine.port))
    host, _, port = bench.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{POST_JSON}content-length: 1000\r\n\r\n{{".encode())
    await asyncio.sleep(0.1)
    writer.transport.abort()
    await asyncio.sleep(0.1)
    assert "Traceback" not in caplog.text and "Exception" not in caplog.text

"""The ingress under many: idle streams, slow readers, callers who leave at any moment. Engines are stand-ins."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import time
from collections.abc import Iterator

import pytest
from starlette.requests import Request

from llmrun.wire import KeyInfo
from llmrun_runtime.asgi import Send
from llmrun_runtime.wire.routing_table import digest_of
from tests.support.ingress import CHAT, Bench, Engine, an_ingress, route

pytestmark = pytest.mark.timeout(300)
IDLE_STREAMS = 2000

LEAVERS = 10_000
SLOW_BYTES = 128 * 2**20
HELD_BYTES = 24 * 2**20  # the kernel's buffers of two connections take most of it


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """Client, ingress and engine are one process here: four sockets for each stream."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Connection:
    """One request over a socket of its own, for clients that behave as none should."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def asking(cls, bench: Bench, body: dict[str, object], headers: str = "") -> Connection:
        """Connect and ask."""
        host, _, port = bench.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**16)
        data = json.dumps({"model": "one", **body}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return cls(reader, writer)

    async def leave(self) -> None:
        """Hang up, rudely."""
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def test_many_idle_streams_hold_and_others_are_served_beside() -> None:
    async with Engine().running() as engine, an_ingress() as bench:
        bench.table(route(engine.port, max_ongoing=10_000))
        streams: list[Connection] = []
        for _ in range(IDLE_STREAMS // 100):
            streams += await asyncio.gather(*(Connection.asking(bench, {"hang": True}) for _ in range(100)))
            await asyncio.gather(*(stream.reader.readuntil(b"data: {}") for stream in streams[-100:]))
        assert bench.waiting.traffic()["one"].in_flight == IDLE_STREAMS
        begun = time.monotonic()
        assert (await bench.ask())[0] == 200
        assert time.monotonic() - begun < 1
        for stream in streams:
            await stream.leave()
        async with asyncio.timeout(30):
            while bench.waiting.traffic():
                await asyncio.sleep(0.05)


async def test_a_slow_reader_holds_the_engine_back_and_not_the_memory() -> None:
    written = 0

    class Pouring(Engine):
        async def answer(self, request: Request, send: Send) -> None:
            nonlocal written
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while written < SLOW_BYTES:
                await send({"type": "http.response.body", "body": b"data: " + b"x" * 65_530, "more_body": True})
                written += 65_536
            await send({"type": "http.response.body", "body": b""})

    async with Pouring().running() as engine, an_ingress() as bench:
        bench.table(route(engine.port))
        slow = await Connection.asking(bench, {})
        await slow.reader.readuntil(b"data: ")
        before = -1
        while written != before:
            before = written
            await asyncio.sleep(0.5)
        assert written < HELD_BYTES, f"{written >> 20} MiB are held for a client that does not read"
        while len(await slow.reader.read(2**20)) and written < SLOW_BYTES:  # it reads after all
            pass
        assert written >= SLOW_BYTES
        await slow.leave()


async def test_callers_who_leave_at_any_moment_leave_no_count_behind() -> None:
    """Some wait, some stream, some are refused; in flight, waiting and limits are all at zero in the end."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    keys = {digest_of(name): KeyInfo(name=name, max_in_flight=30) for name in ("a", "b")}
    done = 0

    async def caller(bench: Bench) -> None:
        nonlocal done
        while done < LEAVERS:
            done += 1
            key = dice.choice(["a", "b"])
            kinds: list[dict[str, object]] = [{}, {"hang": True}, {"stall": 0.05}, {"stream": True}]
            connection = await Connection.asking(bench, dice.choice(kinds), f"authorization: Bearer {key}\r\n")
            patience = dice.choice([0, 0.001, 0.01, 0.1])
            try:
                async with asyncio.timeout(patience):
                    await connection.reader.readuntil(b"\r\n\r\n")
                    await connection.reader.read(2**16)
            except (TimeoutError, asyncio.IncompleteReadError):
                pass
            await connection.leave()

    async with Engine().running() as one, Engine().running() as other, an_ingress() as bench:
        models = (route(one.port, other.port, max_ongoing=10), route(one.port, max_ongoing=3))
        bench.table(models[0], keys=keys)

        async def flicker() -> None:
            """The table changes all along."""
            while True:
                await asyncio.sleep(0.2)
                bench.table(dice.choice(models), keys=keys)

        flickering = asyncio.create_task(flicker())
        await asyncio.gather(*(caller(bench) for _ in range(60)))
        flickering.cancel()
        async with asyncio.timeout(30):
            while bench.waiting.traffic() or bench.waiting._by_key or bench.waiting._by_replica:
                await asyncio.sleep(0.05)
        spent = bench.limiter.spent(time.time())
        assert all(row.in_flight == 0 for row in spent.values()) and any(row.requests for row in spent.values())

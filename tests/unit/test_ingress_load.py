"""The ingress under load: idle streams, slow readers, clients that disconnect at any moment. The engines are fake."""

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

from llmrun.identity import digest_of
from llmrun.wire import KeyInfo
from llmrun_runtime.asgi import Send
from tests.support.ingress import POST_JSON, Bench, Engine, route, running_ingress

pytestmark = pytest.mark.timeout(300)
IDLE_STREAMS = 1000
DISCONNECTS = 3000
SLOW_BYTES = 128 * 2**20
MAX_BUFFERED_BYTES = 24 * 2**20  # mostly the kernel's buffers of two connections


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """Raise the limit of open files: each stream needs four sockets in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Connection:
    """One request on its own socket, for badly behaved clients."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, bench: Bench, body: dict[str, object], headers: str = "") -> Connection:
        """Connect and send the request."""
        host, _, port = bench.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**16)
        data = json.dumps({"model": "one", **body}).encode()
        head = f"{POST_JSON}{headers}content-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return cls(reader, writer)

    async def abort(self) -> None:
        """Reset the connection."""
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def test_many_idle_streams_do_not_delay_other_requests() -> None:
    async with Engine().running() as engine, running_ingress() as bench:
        bench.table(route(engine.port, max_ongoing=10_000))
        streams: list[Connection] = []
        for _ in range(IDLE_STREAMS // 100):
            streams += await asyncio.gather(*(Connection.open(bench, {"hang": True}) for _ in range(100)))
            await asyncio.gather(*(stream.reader.readuntil(b"data: {}") for stream in streams[-100:]))
        assert bench.queue.traffic()["one"].in_flight == IDLE_STREAMS
        started = time.monotonic()
        assert (await bench.post())[0] == 200
        assert time.monotonic() - started < 1
        for stream in streams:
            await stream.abort()
        async with asyncio.timeout(30):
            while bench.queue.traffic():
                await asyncio.sleep(0.05)


async def test_a_slow_reader_pauses_the_engine_instead_of_filling_memory() -> None:
    written = 0

    class FastEngine(Engine):
        async def respond(self, request: Request, send: Send) -> None:
            nonlocal written
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while written < SLOW_BYTES:
                await send({"type": "http.response.body", "body": b"data: " + b"x" * 65_530, "more_body": True})
                written += 65_536
            await send({"type": "http.response.body", "body": b""})

    async with FastEngine().running() as engine, running_ingress() as bench:
        bench.table(route(engine.port))
        slow = await Connection.open(bench, {})
        await slow.reader.readuntil(b"data: ")
        before = -1
        while written != before:
            before = written
            await asyncio.sleep(0.5)
        assert written < MAX_BUFFERED_BYTES, f"{written >> 20} MiB are buffered for a client that does not read"
        while len(await slow.reader.read(2**20)) and written < SLOW_BYTES:  # now it reads
            pass
        assert written >= SLOW_BYTES
        await slow.abort()


async def test_clients_that_disconnect_leave_all_counters_at_zero() -> None:
    """Some wait, some stream, some are rejected; in the end nothing is in flight, queued or counted by limits."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    keys = {digest_of(name): KeyInfo(name=name, max_in_flight=30) for name in ("a", "b")}
    done = 0

    async def caller(bench: Bench) -> None:
        nonlocal done
        while done < DISCONNECTS:
            done += 1
            key = dice.choice(["a", "b"])
            kinds: list[dict[str, object]] = [{}, {"hang": True}, {"stall": 0.05}, {"stream": True}]
            connection = await Connection.open(bench, dice.choice(kinds), f"authorization: Bearer {key}\r\n")
            timeout = dice.choice([0, 0.001, 0.01, 0.1])
            try:
                async with asyncio.timeout(timeout):
                    await connection.reader.readuntil(b"\r\n\r\n")
                    await connection.reader.read(2**16)
            except (TimeoutError, asyncio.IncompleteReadError):
                pass
            await connection.abort()

    async with Engine().running() as one, Engine().running() as other, running_ingress() as bench:
        models = (route(one.port, other.port, max_ongoing=10), route(one.port, max_ongoing=3))
        bench.table(models[0], keys=keys)

        async def change_table() -> None:
            """Keep changing the routing table."""
            while True:
                await asyncio.sleep(0.2)
                bench.table(dice.choice(models), keys=keys)

        changing = asyncio.create_task(change_table())
        await asyncio.gather(*(caller(bench) for _ in range(60)))
        changing.cancel()
        async with asyncio.timeout(30):
            while bench.queue.traffic() or bench.queue.in_flight.by_key or bench.queue.in_flight.by_replica:
                await asyncio.sleep(0.05)
            # A cancelled request leaves the queue a moment before its limits.
            while any(row.in_flight for row in bench.limiter.usage(time.monotonic()).values()):
                await asyncio.sleep(0.05)
        usage = bench.limiter.usage(time.monotonic())
        assert all(row.in_flight == 0 for row in usage.values()) and any(row.requests for row in usage.values())

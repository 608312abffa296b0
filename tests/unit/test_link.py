"""The link between an ingress and an engine: independent requests on one connection."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from llmrun_runtime.asgi import App, Message, Receive, Scope, Send
from llmrun_runtime.link.client import HIGH_WATER_BYTES, Exchange, LinkClient, LinkLostError, Links
from llmrun_runtime.link.frames import BODY, END, HEADERS, MAX_PAYLOAD_BYTES
from llmrun_runtime.link.server import listen

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]
TOKEN, CREDENTIAL = ("x-token", "t"), (b"x-token", b"t")
START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"x-one", b"\xe9")]}


@asynccontextmanager
async def linked(app: App) -> AsyncIterator[LinkClient]:
    """Connect to the app during the block."""
    server = await listen(app, "127.0.0.1", credential=CREDENTIAL)
    links = Links(5)
    try:
        yield await links.get("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        links.close()
        server.close()
        await server.wait_closed()


async def fetch(link: LinkClient, path: str = "/", body: bytes = b"") -> bytes:
    """Return the complete response body."""
    with link.request("POST", path, b"", [TOKEN]) as exchange:
        await exchange.send_body(body)
        await exchange.wait_headers()
        return await read_all(exchange)


async def read_all(exchange: Exchange) -> bytes:
    """Return the rest of the response body."""
    chunks = []
    while chunk := await exchange.read():
        chunks.append(chunk)
    return b"".join(chunks)


async def body_of(receive: Receive) -> bytes:
    """Return the complete request body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    return body


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with the request body."""
    body = await body_of(receive)
    await send(START)
    await send({"type": "http.response.body", "body": body})


async def test_bodies_of_any_size_are_transferred() -> None:
    async with linked(echo) as link:
        bodies = [random.randbytes(size) for size in (0, 1, 65_535, 65_536, 65_537, 5_000_000)] * 3
        assert await asyncio.gather(*(fetch(link, "/", body) for body in bodies)) == bodies


async def test_an_app_sees_a_request_as_over_http() -> None:
    seen: list[Scope] = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await echo(scope, receive, send)
        assert (await receive())["type"] == "http.disconnect"

    async with linked(look) as link:
        with link.request("PUT", "/a/é", b"q=%20\xff", [TOKEN, ("x-two", "\xe9")]) as exchange:
            await exchange.send_body(b"body")
            await exchange.wait_headers()
            assert (exchange.status, exchange.headers) == (200, [(b"x-one", b"\xe9")])
            assert await read_all(exchange) == b"body"
    (scope,) = seen
    assert (scope["method"], scope["path"], scope["query_string"]) == ("PUT", "/a/é", b"q=%20\xff")
    assert scope["headers"] == [CREDENTIAL, (b"x-two", b"\xe9")]


async def test_a_slow_reader_pauses_only_its_own_response() -> None:
    written = 0

    async def write_fast(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal written
        await send(START)
        while scope["path"] == "/fast" and written < 64 * HIGH_WATER_BYTES:
            await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
            written += 1000
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"done"})

    async with linked(write_fast) as link:
        with link.request("POST", "/fast", b"", [TOKEN]) as slow:
            await slow.send_body(b"")
            before = -1
            while written != before:
                before = written
                assert await fetch(link) == b"done"
                await asyncio.sleep(0.1)
            assert HIGH_WATER_BYTES < written < 8 * HIGH_WATER_BYTES
            assert len(await read_all(slow)) == written + 4 > 64 * HIGH_WATER_BYTES


async def test_a_large_body_does_not_delay_small_ones() -> None:
    async with linked(echo) as link:
        large = asyncio.create_task(fetch(link, "/", bytes(16 * 2**20)))
        waits = []
        while not large.done():
            started = time.monotonic()
            assert await fetch(link, "/", b"small") == b"small"
            waits.append(time.monotonic() - started)
        assert len(waits) > 3 and len(await large) == 16 * 2**20


async def test_a_cancelled_request_is_disconnected_and_others_continue() -> None:
    disconnected = asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        await send(START)
        if scope["path"] == "/wait":
            assert (await receive())["type"] == "http.disconnect"
            disconnected.set()
        await send({"type": "http.response.body", "body": b"done"})

    async with linked(wait) as link:
        with link.request("POST", "/wait", b"", [TOKEN]) as exchange:
            await exchange.send_body(b"")
            await exchange.wait_headers()
            assert not disconnected.is_set()
        await asyncio.wait_for(disconnected.wait(), 1)
        assert await fetch(link) == b"done"


async def test_an_app_that_raises() -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/late":
            await send(START)
            await send({"type": "http.response.body", "body": b"so far", "more_body": True})
        elif scope["path"] == "/headers":
            await send({**START, "headers": [(b"x", b"x" * MAX_PAYLOAD_BYTES)]})
        raise RuntimeError("no")

    async with linked(fail) as link:
        for path in ("/early", "/headers"):
            with link.request("GET", path, b"", [TOKEN]) as exchange:
                await exchange.wait_headers()
                assert exchange.status == 500 and b"engine_failed" in await read_all(exchange)
        with link.request("GET", "/late", b"", [TOKEN]) as exchange:
            await exchange.wait_headers()
            assert await exchange.read() == b"so far"
            with pytest.raises(LinkLostError, match="app failed"):
                await exchange.read()


async def test_a_closed_connection_is_detected_and_replaced() -> None:
    disconnected = asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"
        disconnected.set()

    server = await listen(wait, "127.0.0.1", credential=CREDENTIAL)
    port = server.sockets[0].getsockname()[1]
    links = Links(5)
    first, second = await asyncio.gather(links.get("127.0.0.1", port), links.get("127.0.0.1", port))
    assert first is second
    with first.request("POST", "/", b"", [TOKEN]) as exchange:
        await asyncio.sleep(0.05)
        first.close()
        with pytest.raises(LinkLostError, match="was closed"):
            await exchange.wait_headers()
    await asyncio.wait_for(disconnected.wait(), 1)
    assert await links.get("127.0.0.1", port) is not first
    links.close()
    server.close()
    await server.wait_closed()
    with pytest.raises(ConnectionError):
        await links.get("127.0.0.1", port)


async def test_headers_larger_than_a_frame_are_rejected_before_sending() -> None:
    async with linked(echo) as link:
        with pytest.raises(ValueError, match="headers are larger than 256 KiB"):
            link.request("POST", "/", b"", [("x", "x" * MAX_PAYLOAD_BYTES)])
        assert await fetch(link, "/", b"still here") == b"still here"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100,
        bytes((0, 0, 0, 2, 0, 0, 0, 1, HEADERS)) + b"[]",
        bytes((0, 0, 0, 1, 0, 0, 0, 1, HEADERS)) + b"{",
    ],
)
async def test_invalid_data_closes_the_connection(sent: bytes) -> None:
    server = await listen(echo, "127.0.0.1", credential=CREDENTIAL)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(sent)
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()
    server.close()


async def test_frames_are_parsed_however_the_bytes_arrive() -> None:
    """Chunks have any size, and frames may belong to requests that were never started."""

    class Recorder(LinkClient):
        def on_frame(self, number: int, kind: int, payload: bytes) -> None:
            frames.append((number, kind, payload))

    frames: list[tuple[int, int, bytes]] = []
    expected = [(n, random.choice([BODY, END]), random.randbytes(random.randrange(300))) for n in range(500)]
    wire = b"".join(
        len(data).to_bytes(4, "big") + n.to_bytes(4, "big") + bytes([kind]) + data for n, kind, data in expected
    )
    link = Recorder()
    while wire:
        size = random.choice([1, 5, 9, 10, 1000, 5000])
        link.data_received(wire[:size])
        wire = wire[size:]
    assert frames == expected


async def test_a_stranger_holds_no_memory_and_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytes] = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await body_of(receive))
        await send(START)
        await send({"type": "http.response.body", "body": b""})

    monkeypatch.setattr("llmrun_runtime.link.server.TOKEN_TIMEOUT_S", 0.5)
    async with linked(look) as link:
        with link.request("POST", "/", b"", [("x-token", "guess")]) as exchange:
            await exchange.send_body(b"x" * 1000)
            await exchange.wait_headers()
        async with asyncio.timeout(5):
            while link.open:
                await asyncio.sleep(0.01)
    assert bodies == [b""], "the frames of its body are dropped"
    async with linked(look) as link:
        await fetch(link, "/", b"mine")
        await asyncio.sleep(1)
        await fetch(link, "/", b"still open")
    assert bodies[1:] == [b"mine", b"still open"]

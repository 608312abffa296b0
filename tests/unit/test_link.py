"""The link between an ingress and an engine: many requests on one connection that leave each other alone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from llmrun_runtime.asgi import App, Message, Receive, Scope, Send
from llmrun_runtime.link.client import HIGH, Answer, LinkClient, LinkLostError, Links
from llmrun_runtime.link.frames import BODY, END, MOST, OPEN
from llmrun_runtime.link.server import listen

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]
START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"x-one", b"\xe9")]}


@asynccontextmanager
async def linked(app: App) -> AsyncIterator[LinkClient]:
    """A connection to that app."""
    server = await listen(app, "127.0.0.1")
    links = Links(5)
    try:
        yield await links.get("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        links.close()
        server.close()
        await server.wait_closed()


async def ask(link: LinkClient, path: str = "/", body: bytes = b"") -> bytes:
    """The whole answer."""
    with link.ask("POST", path, b"", []) as answer:
        await link.finish(answer, body)
        await answer.started()
        return await rest_of(answer)


async def rest_of(answer: Answer) -> bytes:
    """All that is still to come."""
    pieces = []
    while piece := await answer.read():
        pieces.append(piece)
    return b"".join(pieces)


async def body_of(receive: Receive) -> bytes:
    """The body that an app is asked with."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    return body


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Say the body back."""
    body = await body_of(receive)
    await send(START)
    await send({"type": "http.response.body", "body": body})


async def test_what_is_said_comes_back_whole_whatever_its_size() -> None:
    async with linked(echo) as link:
        bodies = [random.randbytes(size) for size in (0, 1, 65_535, 65_536, 65_537, 5_000_000)] * 3
        assert await asyncio.gather(*(ask(link, "/", body) for body in bodies)) == bodies


async def test_an_app_sees_a_request_as_http_would_have_it() -> None:
    seen: list[Scope] = []

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await echo(scope, receive, send)
        assert (await receive())["type"] == "http.disconnect"

    async with linked(look) as link:
        with link.ask("PUT", "/a/é", b"q=%20\xff", [("x-two", "\xe9")]) as answer:
            await link.finish(answer, b"body")
            await answer.started()
            assert (answer.status, answer.headers) == (200, [(b"x-one", b"\xe9")])
            assert await rest_of(answer) == b"body"
    (scope,) = seen
    assert (scope["method"], scope["path"], scope["query_string"]) == ("PUT", "/a/é", b"q=%20\xff")
    assert scope["headers"] == [(b"x-two", b"\xe9")]


async def test_a_slow_reader_is_waited_for_and_nobody_beside_it() -> None:
    written = 0

    async def pour(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal written
        await send(START)
        while scope["path"] == "/pour" and written < 64 * HIGH:
            await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
            written += 1000
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"done"})

    async with linked(pour) as link:
        with link.ask("POST", "/pour", b"", []) as slow:
            await link.finish(slow, b"")
            before = -1
            while written != before:
                before = written
                assert await ask(link) == b"done"
                await asyncio.sleep(0.1)
            assert HIGH < written < 8 * HIGH
            assert len(await rest_of(slow)) == written + 4 > 64 * HIGH


async def test_a_large_body_does_not_hold_up_small_ones() -> None:
    async with linked(echo) as link:
        large = asyncio.create_task(ask(link, "/", bytes(64 * 2**20)))
        waits = []
        while not large.done():
            begun = time.monotonic()
            assert await ask(link, "/", b"small") == b"small"
            waits.append(time.monotonic() - begun)
        assert len(waits) > 3 and len(await large) == 64 * 2**20


async def test_who_leaves_is_heard_of_and_others_stay() -> None:
    left = asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await body_of(receive)
        await send(START)
        if scope["path"] == "/wait":
            assert (await receive())["type"] == "http.disconnect"
            left.set()
        await send({"type": "http.response.body", "body": b"done"})

    async with linked(wait) as link:
        with link.ask("POST", "/wait", b"", []) as answer:
            await link.finish(answer, b"")
            await answer.started()
            assert not left.is_set()
        await asyncio.wait_for(left.wait(), 1)
        assert await ask(link) == b"done"


async def test_an_app_that_fails() -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/late":
            await send(START)
            await send({"type": "http.response.body", "body": b"so far", "more_body": True})
        elif scope["path"] == "/headers":
            await send({**START, "headers": [(b"x", b"x" * MOST)]})
        raise RuntimeError("no")

    async with linked(fail) as link:
        for path in ("/early", "/headers"):
            with link.ask("GET", path, b"", []) as answer:
                await answer.started()
                assert answer.status == 500 and b"engine_failed" in await rest_of(answer)
        with link.ask("GET", "/late", b"", []) as answer:
            await answer.started()
            assert await answer.read() == b"so far"
            with pytest.raises(LinkLostError, match="app failed"):
                await answer.read()


async def test_a_connection_that_ends_is_noticed_on_both_sides_and_made_anew() -> None:
    gone = asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"
        gone.set()

    server = await listen(wait, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    links = Links(5)
    first, second = await asyncio.gather(links.get("127.0.0.1", port), links.get("127.0.0.1", port))
    assert first is second
    with first.ask("POST", "/", b"", []) as answer:
        await asyncio.sleep(0.05)
        first.close()
        with pytest.raises(LinkLostError, match="was closed"):
            await answer.started()
    await asyncio.wait_for(gone.wait(), 1)
    assert await links.get("127.0.0.1", port) is not first
    links.close()
    server.close()
    await server.wait_closed()
    with pytest.raises(ConnectionError):
        await links.get("127.0.0.1", port)


async def test_headers_beyond_what_a_frame_holds_are_refused_before_they_harm_others() -> None:
    async with linked(echo) as link:
        with pytest.raises(ValueError, match="headers are over 256 KiB"):
            link.ask("POST", "/", b"", [("x", "x" * MOST)])
        assert await ask(link, "/", b"still here") == b"still here"


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 100,
        bytes((0, 0, 0, 2, 0, 0, 0, 1, OPEN)) + b"[]",
        bytes((0, 0, 0, 1, 0, 0, 0, 1, OPEN)) + b"{",
    ],
)
async def test_strangers_are_shown_the_door(sent: bytes) -> None:
    server = await listen(echo, "127.0.0.1")
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(sent)
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()
    server.close()


async def test_frames_are_put_together_however_the_bytes_arrive() -> None:
    """In pieces of all sizes, for requests that were never begun too."""

    class Heard(LinkClient):
        def heard(self, number: int, kind: int, payload: bytes) -> None:
            frames.append((number, kind, payload))

    frames: list[tuple[int, int, bytes]] = []
    said = [(n, random.choice([BODY, END]), random.randbytes(random.randrange(300))) for n in range(500)]
    wire = b"".join(
        len(data).to_bytes(4, "big") + n.to_bytes(4, "big") + bytes([kind]) + data for n, kind, data in said
    )
    link = Heard()
    while wire:
        size = random.choice([1, 5, 9, 10, 1000, 5000])
        link.data_received(wire[:size])
        wire = wire[size:]
    assert frames == said

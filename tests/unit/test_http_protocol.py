"""The limits for request headers and connections, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn

from llmrun_runtime import http
from llmrun_runtime.asgi import Receive, Scope, Send, send_json
from llmrun_runtime.http_protocol import MAX_HEADER_BYTES, MAX_HEADERS, LimitedProtocol

TIMEOUT_S = 0.3
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"


class Short(LimitedProtocol):
    headers_timeout = linger = TIMEOUT_S
    max_connections = 20


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without reading the body; slowly at `/slow`."""
    await asyncio.sleep(3 * TIMEOUT_S if scope["path"] == "/slow" else 0)
    await send_json(send, 200, {})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    sock = http.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, http=Short, ws="none", lifespan="off", log_config=None))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    yield sock.getsockname()[1]
    server.should_exit = server.force_exit = True
    await serving


async def is_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dribble: bytes) -> bool:
    """Whether the server closes the connection soon, while a byte is sent from time to time."""
    for _ in range(20):
        if dribble:
            writer.write(dribble)
        try:
            async with asyncio.timeout(TIMEOUT_S / 4):
                while await reader.read(65536):
                    pass
                return True
        except TimeoutError:
            continue
        except ConnectionResetError:
            return True
    return False


async def reply(port: int, *pieces: bytes) -> bytes:
    """Return all that the server sends until it closes the connection, or for a second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(1):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            while data := await reader.read(65536):
                received += data
    writer.close()
    return received


@pytest.mark.parametrize(
    "pieces",
    [
        [GET[:-2], b"".join(b"a%d: b\r\n" % number for number in range(MAX_HEADERS)), b"\r\n"],
        [GET[:-2], b"".join(b"a%d: %s\r\n" % (number, b"b" * 4096) for number in range(20)), b"\r\n"],
        [GET[:-2] + b"x: ", *[b"a" * 8192] * 1000],
        [b"GET /" + b"a" * MAX_HEADER_BYTES + GET[5:]],
        [b"GET /", *[b"a" * 8192] * 1000],
        [GET[:-2], *[b"a" * 8192] * 1000],
    ],
    ids=["many", "large", "endless-value", "large-target", "endless-target", "endless-name"],
)
async def test_headers_that_are_too_large_are_refused(port: int, pieces: list[bytes]) -> None:
    answer = await reply(port, *pieces)
    assert answer.startswith(b"HTTP/1.1 431 "), answer
    assert answer or len(pieces) > 3
    assert b"200 OK" not in answer


async def test_headers_below_the_limits_are_accepted(port: int) -> None:
    many = b"".join(b"a%d: %s\r\n" % (number, b"b" * 300) for number in range(MAX_HEADERS - 1))
    assert (await reply(port, GET[:-2] + many + b"\r\n")).startswith(b"HTTP/1.1 200")


async def test_what_is_not_http_gets_an_error_in_openais_shape(port: int) -> None:
    head, _, body = (await reply(port, b"\x16\x03\x01 hello\r\n\r\n")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"


async def test_an_endless_trailer_does_not_write_into_the_response(port: int) -> None:
    start = b"POST /slow HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"
    answer = await reply(port, start, b"".join(b"a%d: b\r\n" % number for number in range(2 * MAX_HEADERS)))
    assert answer.count(b"HTTP/1.1") <= 1 and b"200 OK" not in answer


async def test_a_connection_beyond_the_limit_takes_the_place_of_an_idle_one(port: int) -> None:
    busy = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
    for _, writer in busy:
        writer.write(GET.replace(b"/", b"/slow", 1))
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(GET)
    assert await asyncio.wait_for(reader.readuntil(b"{}"), 5)
    for each, _ in busy:
        assert await asyncio.wait_for(each.readuntil(b"{}"), 5)
    for _, each_writer in (*busy, *idle, (reader, writer)):
        each_writer.close()


@pytest.mark.parametrize(
    ("start", "dribble"),
    [(b"", b""), (b"GET / HT", b""), (GET[:-2] + b"x: ", b"a"), (GET + b"G", b""), (GET, b"\r\n"), (UPLOAD, b"a")],
    ids=["silent", "half-header", "dribbled-header", "half-second-header", "empty-lines", "dribble-after-refusal"],
)
async def test_a_connection_without_complete_headers_is_closed(port: int, start: bytes, dribble: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(start[: len(GET)] if start.startswith(GET) else start)
    if start.startswith(GET) or start == UPLOAD:
        await reader.readuntil(b"{}")
    writer.write(start[len(GET) :] if start.startswith(GET) else b"")
    assert await is_closed(reader, writer, dribble)
    writer.close()


async def test_slow_answers_and_idle_connections_are_kept(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(GET.replace(b"/", b"/slow", 1))
        assert await asyncio.wait_for(reader.readuntil(b"{}"), 5)
        await asyncio.sleep(2 * TIMEOUT_S)
    writer.close()


async def test_a_client_that_uploads_can_read_an_early_refusal(port: int) -> None:
    """Bytes that arrive after a close make the kernel reset the connection, and discard the response."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(UPLOAD.replace(b"host: x\r\n", b"host: x\r\nconnection: close\r\n"))
    await asyncio.sleep(TIMEOUT_S / 3)
    for _ in range(3):
        writer.write(b"a" * 1000)
        await asyncio.sleep(TIMEOUT_S / 6)
    assert (await asyncio.wait_for(reader.readuntil(b"{}"), 1)).startswith(b"HTTP/1.1 200")
    writer.close()


async def test_a_client_that_never_stops_uploading_is_cut_off(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(UPLOAD.replace(b"host: x\r\n", b"host: x\r\nconnection: close\r\n"))
    assert await reader.read()
    async with asyncio.timeout(5 * TIMEOUT_S):
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.02)


async def test_a_closed_connection_leaves_no_cycle(port: int) -> None:
    """Its protocol holds what the client sent."""
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(each, Short) for each in gc.get_objects())
        for _ in range(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(UPLOAD.replace(b"host: x\r\n", b"host: x\r\nconnection: close\r\n"))
            await reader.read()
            writer.close()
            await writer.wait_closed()
        await asyncio.sleep(2 * TIMEOUT_S)
        assert sum(isinstance(each, Short) for each in gc.get_objects()) - before <= 1
    finally:
        gc.enable()

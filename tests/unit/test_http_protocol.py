"""The deadline for request headers, over real sockets."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import pytest
import uvicorn

from llmrun_runtime import http
from llmrun_runtime.asgi import Receive, Scope, Send, send_json
from llmrun_runtime.http_protocol import HeaderDeadlineProtocol

TIMEOUT_S = 0.3
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"


class Short(HeaderDeadlineProtocol):
    headers_timeout = linger = TIMEOUT_S


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

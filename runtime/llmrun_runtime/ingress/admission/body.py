"""Reads request bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import ClientDisconnect

from llmrun_runtime.asgi import Receive, Scope
from llmrun_runtime.ingress.errors import HTTPError

BODY_TIMEOUT_S = 60.0
# A client that uploads slower than this for longer than the timeout is disconnected.
MIN_BYTES_PER_S = 16 * 2**10


async def read_body(
    scope: Scope,
    receive: Receive,
    limit: int,
    reserve: Callable[[int], None] = lambda size: None,
    timeout: float = BODY_TIMEOUT_S,
) -> bytes:
    """Read the complete body. Raises ClientDisconnect, or HTTPError.

    1. 413 above `limit` bytes, before reading if Content-Length is known.
    2. What `reserve` raises; it is called with the size of each chunk.
    3. 408 if no byte arrives for `timeout` seconds, or all together arrive slower than MIN_BYTES_PER_S.
    """
    too_large = HTTPError(413, f"request body is larger than {limit >> 20} MiB", "body_too_large")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    loop = asyncio.get_running_loop()
    started = loop.time()
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        slowest = started + timeout + size / MIN_BYTES_PER_S
        try:
            async with asyncio.timeout_at(min(loop.time() + timeout, slowest)):
                message = await receive()
        except TimeoutError:
            text = f"timed out after {loop.time() - started:.3g} s while the request body arrived (LLMRUN_BODY_TIMEOUT)"
            raise HTTPError(408, text, "body_timeout", close=True) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        reserve(len(chunk))
        chunks.append(chunk)
        more = message.get("more_body", False)
    return b"".join(chunks)

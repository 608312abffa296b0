"""Reads request bodies."""

from __future__ import annotations

import asyncio

from llmrun_runtime.asgi import Receive, Scope
from llmrun_runtime.ingress.errors import HTTPError


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Read the complete body. Raises HTTPError (413) above `limit` bytes, before reading if Content-Length is known."""
    too_large = HTTPError(413, f"request body is larger than {limit >> 20} MiB", "body_too_large")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > limit:
            raise too_large
        more = message.get("more_body", False)
    return b"".join(chunks)

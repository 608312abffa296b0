"""Forwards requests to control's HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from llmrun_runtime.asgi import Receive, Scope, Send
from llmrun_runtime.ingress.relay import DROPPED_FROM_RESPONSE, UpstreamUnavailable, forwarded_headers
from llmrun_runtime.wire.headers import CLIENT_HEADER

CONNECT_TIMEOUT_S = 5
NOT_FORWARDED = frozenset({b"content-length", CLIENT_HEADER.encode()})
METHODS_WITH_BODY = ("POST", "PUT", "PATCH")
# aiohttp would add these; control should get the client's headers only.
AUTO_HEADERS = ("user-agent", "accept", "accept-encoding", "content-type")


def new_session() -> aiohttp.ClientSession:
    """Return a client without limits on connections or response times, which does not decompress bodies."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def forward(session: aiohttp.ClientSession, scope: Scope, receive: Receive, send: Send, url: str) -> None:
    """Forward a request to `url` and stream the response. Raises UpstreamUnavailable before its first byte."""
    if scope["query_string"]:
        url += "?" + scope["query_string"].decode("latin-1")
    body = _stream_body(receive) if scope["method"] in METHODS_WITH_BODY else None
    try:
        response = await session.request(
            scope["method"],
            url,
            headers=[*forwarded_headers(scope, NOT_FORWARDED), (CLIENT_HEADER, (scope.get("client") or ("",))[0])],
            data=body,
            allow_redirects=False,
            skip_auto_headers=AUTO_HEADERS,
        )
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise UpstreamUnavailable(str(error) or type(error).__name__, reached=True) from error
    async with response:
        raw = response.raw_headers
        kept = [(key.lower(), value) for key, value in raw if key.lower() not in DROPPED_FROM_RESPONSE]
        await send({"type": "http.response.start", "status": response.status, "headers": kept})
        async for chunk in response.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _stream_body(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the body in chunks."""
    more = True
    while more:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        yield message.get("body", b"")
        more = message.get("more_body", False)

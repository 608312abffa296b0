"""Passes requests for control on, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from llmrun_runtime.asgi import Receive, Scope, Send
from llmrun_runtime.ingress.relay import OF_THE_ANSWER, UpstreamGone, forwarded_headers

CONNECT_TIMEOUT_S = 5
WITH_BODY = ("POST", "PUT", "PATCH")
# What aiohttp would add: control hears what the client said and no more.
AUTO_HEADERS = ("user-agent", "accept", "accept-encoding", "content-type")


def new_session() -> aiohttp.ClientSession:
    """A client without a limit on connections or on how long an answer takes; it keeps bytes as they are."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


async def pass_on(session: aiohttp.ClientSession, scope: Scope, receive: Receive, send: Send, url: str) -> None:
    """Ask `url` and stream its answer to the client as it comes. Raises UpstreamGone before the answer's first byte."""
    if scope["query_string"]:
        url += "?" + scope["query_string"].decode("latin-1")
    body = _stream_body(receive) if scope["method"] in WITH_BODY else None
    try:
        answer = await session.request(
            scope["method"],
            url,
            headers=forwarded_headers(scope, frozenset({b"content-length"})),
            data=body,
            allow_redirects=False,
            skip_auto_headers=AUTO_HEADERS,
        )
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise UpstreamGone(str(error) or type(error).__name__, reached=True) from error
    async with answer:
        kept = [(key.lower(), value) for key, value in answer.raw_headers if key.lower() not in OF_THE_ANSWER]
        await send({"type": "http.response.start", "status": answer.status, "headers": kept})
        async for chunk in answer.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _stream_body(receive: Receive) -> AsyncIterator[bytes]:
    """The body piece by piece."""
    more = True
    while more:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        yield message.get("body", b"")
        more = message.get("more_body", False)

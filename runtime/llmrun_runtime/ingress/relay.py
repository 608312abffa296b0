"""Moves bytes between a client and an upstream: an engine, or control. Reads none of them."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from llmrun_runtime.asgi import Receive, Scope, Send, error_body
from llmrun_runtime.engines.base import IDLE_CONNECTION_S
from llmrun_runtime.ingress.admission import Refusal

EVENTS = "text/event-stream"
# RFC 9110, 7.6.1; and what this hop says itself.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
OF_THIS_HOP = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
OF_THE_ANSWER = HOP_BY_HOP | {b"date", b"server"}
# What aiohttp would add: the upstream hears what the client said and no more.
AUTO_HEADERS = ("user-agent", "accept", "accept-encoding", "content-type")


class UpstreamGone(Exception):
    """The upstream could not be reached, or went away before the first byte of its answer.

    `reached` says that the request may have got there.
    """

    def __init__(self, text: str, reached: bool) -> None:
        super().__init__(text)
        self.reached = reached


@dataclass(frozen=True)
class Deadlines:
    """Seconds; 0 is none."""

    connect: float = 5
    first_byte: float = 0
    between: float = 0


def new_session() -> aiohttp.ClientSession:
    """A client for upstreams: no limit on connections, no deadline on healthy streams, bytes as they are."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S, socket_factory=_watched_socket),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=Deadlines().connect),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _watched_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket that notices within about 30 s that the other machine is gone, however quiet the stream is."""
    family, kind, proto, _, _ = address
    sock = socket.socket(family=family, type=kind, proto=proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock


def forwarded_headers(scope: Scope, drop: frozenset[bytes] = frozenset()) -> list[tuple[str, str]]:
    """The client's headers without those of this hop and of `drop`."""
    return [
        (key.decode("latin-1"), value.decode("latin-1"))
        for key, value in scope["headers"]
        if key not in OF_THIS_HOP and key not in drop
    ]


async def relay(
    session: aiohttp.ClientSession,
    scope: Scope,
    send: Send,
    url: str,
    headers: list[tuple[str, str]],
    body: bytes | AsyncIterator[bytes] | None,
    answer_headers: list[tuple[bytes, bytes]],
    on_first: Callable[[], None] = lambda: None,
    deadlines: Deadlines = Deadlines(),
) -> None:
    """Ask `url` and stream its answer to the client as it comes; `on_first` is called with its first piece.

    Raises UpstreamGone, or Refusal if it is late, before the first byte. After it, a stream of events from an upstream
    that breaks off ends with an error event; any other answer breaks off too, so that nobody takes half of it for all.
    """
    if scope["query_string"]:
        url += "?" + scope["query_string"].decode("latin-1")
    # As a file: aiohttp warns of large plain bytes, and writes those in one piece.
    data = io.BytesIO(body) if isinstance(body, bytes) else body
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=deadlines.connect, sock_read=deadlines.between or None)
    try:
        async with asyncio.timeout(deadlines.first_byte or None):
            upstream = await session.request(
                scope["method"],
                url,
                headers=headers,
                data=data,
                allow_redirects=False,
                skip_auto_headers=AUTO_HEADERS,
                timeout=timeout,
            )
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise UpstreamGone(str(error) or type(error).__name__, reached=False) from error
    except TimeoutError:
        text = "the engine did not begin its answer in time (LLMRUN_FIRST_BYTE_TIMEOUT, LLMRUN_IDLE_STREAM_TIMEOUT)"
        raise Refusal(504, text, "engine_timeout", "service_unavailable") from None
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamGone(str(error) or type(error).__name__, reached=True) from error
    async with upstream:
        kept = [(key.lower(), value) for key, value in upstream.raw_headers if key.lower() not in OF_THE_ANSWER]
        await send({"type": "http.response.start", "status": upstream.status, "headers": [*kept, *answer_headers]})
        first, last = True, b""
        try:
            async for chunk in upstream.content.iter_any():
                if first:
                    first = False
                    on_first()
                last = chunk
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (aiohttp.ClientError, TimeoutError) as error:
            if upstream.content_type != EVENTS:
                raise
            await send({"type": "http.response.body", "body": _broken_off(last, error)})
            return
        await send({"type": "http.response.body", "body": b""})


def _broken_off(last: bytes, error: Exception) -> bytes:
    """The event that ends a stream whose engine is gone, after its `last` piece."""
    late = isinstance(error, TimeoutError)
    text = "paused for too long (LLMRUN_IDLE_STREAM_TIMEOUT)" if late else "went away: `llmrun logs` says why"
    body = error_body(f"the stream ends early: its engine {text}", "service_unavailable", "stream_broken_off")
    event = b"data: " + json.dumps(body).encode() + b"\n\n"
    return event if not last or last.endswith(b"\n\n") else b"\n\n" + event


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises Refusal above `limit` bytes, before it is read where its length is said."""
    too_large = Refusal(413, f"the body is over {limit >> 20} MiB", "body_too_large")
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


async def stream_body(receive: Receive) -> AsyncIterator[bytes]:
    """The body piece by piece."""
    more = True
    while more:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        yield message.get("body", b"")
        more = message.get("more_body", False)

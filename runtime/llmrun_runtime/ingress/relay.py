"""Relays a request to a replica and its response to the client. Of the bodies, it reads only those of errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from llmrun_runtime.asgi import Scope, Send
from llmrun_runtime.ingress.admission.held_bytes import HeldBody
from llmrun_runtime.ingress.engine_errors import MAX_ERROR_BYTES, engine_error
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.link.client import Exchange, LinkLostError, Links
from llmrun_runtime.wire.headers import DIED, GONE_HEADER, TOKEN_HEADER
from llmrun_runtime.wire.routing_table import ReplicaRoute

EVENT_STREAM = b"text/event-stream"
# For the rest of an engine's error response.
ERROR_TIMEOUT_S = 10.0
# RFC 9110, 7.6.1.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
# This hop sets these itself.
DROPPED_FROM_REQUEST = HOP_BY_HOP | {b"host", b"expect"}
DROPPED_FROM_RESPONSE = HOP_BY_HOP | {b"date", b"server"}


class UpstreamUnavailable(Exception):
    """The upstream could not be reached, or its connection was lost before the first byte of the response.

    `reached`: whether the upstream may have received the request.
    """

    def __init__(self, message: str, reached: bool) -> None:
        super().__init__(message)
        self.reached = reached


@dataclass(frozen=True)
class Deadlines:
    """Timeouts in seconds; 0 is none."""

    first_byte: float = 0
    idle_stream: float = 0
    """Between two chunks of a response."""


@dataclass(frozen=True)
class UpstreamRequest:
    """A request as it is sent to a replica, and how its response is returned."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[str, str]]
    """All but the replica's token."""
    body: HeldBody
    response_headers: list[tuple[bytes, bytes]]
    """Headers that the ingress adds to the response."""
    deadlines: Deadlines


def forwarded_headers(scope: Scope, drop: frozenset[bytes] = frozenset()) -> list[tuple[str, str]]:
    """Return the client's headers without those of this hop and those in `drop`."""
    return [
        (key.decode("latin-1"), value.decode("latin-1"))
        for key, value in scope["headers"]
        if key not in DROPPED_FROM_REQUEST and key not in drop
    ]


async def relay(
    links: Links, replica: ReplicaRoute, request: UpstreamRequest, send: Send, on_first_byte: Callable[[bool], None]
) -> None:
    """Send the request to the replica and stream the response to the client.

    `on_first_byte` is called once, and told whether the response is an answer, not an error.

    Before the first byte, raises UpstreamUnavailable. Raises HTTPError for an error response of the engine, on a
    timeout, and, also after the response has begun, if the engine fails.
    """
    try:
        link = await links.get(replica.host, replica.port)
    except (OSError, TimeoutError) as error:
        raise UpstreamUnavailable(str(error) or type(error).__name__, reached=False) from error
    try:
        headers = [*request.headers, (TOKEN_HEADER, replica.token)]
        exchange = link.request(request.method, request.path, request.query, headers)
    except ValueError as error:
        raise HTTPError(431, f"request {error}", "headers_too_large") from None
    with exchange:
        try:
            async with asyncio.timeout(request.deadlines.first_byte or None):
                await exchange.send_body(request.body.content)
                await exchange.wait_headers()
        except TimeoutError:
            message = (
                f"timed out after {request.deadlines.first_byte:g} s while waiting for the engine's response "
                f"(LLMRUN_FIRST_BYTE_TIMEOUT)"
            )
            raise HTTPError(504, message, "engine_timeout", "service_unavailable") from None
        except LinkLostError as error:
            raise UpstreamUnavailable(str(error), reached=True) from error
        if gone := exchange.status == 503 and _gone(exchange.headers):
            died = gone == DIED.encode()
            raise UpstreamUnavailable("its engine died" if died else "it is shutting down", reached=died)
        if exchange.status >= 400:
            on_first_byte(False)
            body = await _read_error(exchange, request.deadlines.idle_stream)
            raise engine_error(exchange.status, exchange.headers, body, request.path)
        kept = [(key.lower(), value) for key, value in exchange.headers if key.lower() not in DROPPED_FROM_RESPONSE]
        response_headers = [*kept, *request.response_headers]
        await send({"type": "http.response.start", "status": exchange.status, "headers": response_headers})
        await _stream(exchange, send, on_first_byte, request.deadlines.idle_stream)


def _gone(headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the value of GONE_HEADER; b"" if the replica did not send it."""
    return next((value for key, value in headers if key.lower() == GONE_HEADER.encode()), b"")


async def _stream(exchange: Exchange, send: Send, on_first_byte: Callable[[bool], None], idle_timeout: float) -> None:
    """Pass the response on, chunk by chunk. Raises HTTPError if the engine ends, or sends nothing for too long."""
    started = False
    while True:
        try:
            if idle_timeout:
                async with asyncio.timeout(idle_timeout):
                    chunk = await exchange.read()
            else:
                chunk = await exchange.read()
        except TimeoutError:
            raise interrupted(f"the engine sent nothing for {idle_timeout:g} s (LLMRUN_IDLE_STREAM_TIMEOUT)") from None
        except LinkLostError:
            raise interrupted("the connection to the engine was lost. See `llmrun logs`") from None
        if not started:
            on_first_byte(True)
            started = True
        await send({"type": "http.response.body", "body": chunk, "more_body": bool(chunk)})
        if not chunk:
            return


async def _read_error(exchange: Exchange, timeout: float) -> bytes:
    """Return the body of an engine's error response, or its first MAX_ERROR_BYTES."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout or ERROR_TIMEOUT_S):
            while len(body) < MAX_ERROR_BYTES and (chunk := await exchange.read()):
                body += chunk
    except (LinkLostError, TimeoutError):
        pass  # what has arrived says more than that the rest is missing
    return bytes(body[:MAX_ERROR_BYTES])


def interrupted(reason: str) -> HTTPError:
    """The error for a response that has begun and cannot go on."""
    return HTTPError(503, f"stream interrupted: {reason}", "stream_broken_off", "service_unavailable")

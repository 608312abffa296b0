"""Moves bytes between a client and an engine. Reads none of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

from llmrun_runtime.asgi import Receive, Scope, Send, error_body
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.link.client import Answer, LinkLostError, Links
from llmrun_runtime.wire.headers import GONE_HEADER
from llmrun_runtime.wire.routing_table import ReplicaRoute

EVENTS = b"text/event-stream"
# RFC 9110, 7.6.1; and what this hop says itself.
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)
OF_THIS_HOP = HOP_BY_HOP | {b"host", b"expect"}
OF_THE_ANSWER = HOP_BY_HOP | {b"date", b"server"}


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

    first_byte: float = 0
    between: float = 0


def forwarded_headers(scope: Scope, drop: frozenset[bytes] = frozenset()) -> list[tuple[str, str]]:
    """The client's headers without those of this hop and of `drop`."""
    return [
        (key.decode("latin-1"), value.decode("latin-1"))
        for key, value in scope["headers"]
        if key not in OF_THIS_HOP and key not in drop
    ]


async def relay(
    links: Links,
    replica: ReplicaRoute,
    scope: Scope,
    send: Send,
    headers: list[tuple[str, str]],
    body: bytes,
    answer_headers: list[tuple[bytes, bytes]],
    on_first: Callable[[], None],
    deadlines: Deadlines,
) -> None:
    """Ask the replica and stream its answer to the client as it comes; `on_first` is called with its first piece.

    Raises UpstreamGone, or Refusal if it is late, before the first byte. After it, a stream of events from an engine
    that breaks off ends with an error event; any other answer breaks off too, so that nobody takes half of it for all.
    """
    try:
        link = await links.get(replica.host, replica.port)
    except (OSError, TimeoutError) as error:
        raise UpstreamGone(str(error) or type(error).__name__, reached=False) from error
    try:
        asked = link.ask(scope["method"], scope["path"], scope["query_string"], headers)
    except ValueError as error:
        raise HTTPError(431, str(error), "headers_too_large") from None
    with asked as answer:
        try:
            async with asyncio.timeout(deadlines.first_byte or None):
                await link.finish(answer, body)
                await answer.started()
        except TimeoutError:
            text = "the engine did not begin its answer in time (LLMRUN_FIRST_BYTE_TIMEOUT)"
            raise HTTPError(504, text, "engine_timeout", "service_unavailable") from None
        except LinkLostError as error:
            raise UpstreamGone(str(error), reached=True) from error
        if answer.status == 503 and any(key.lower() == GONE_HEADER.encode() for key, _ in answer.headers):
            raise UpstreamGone("it ends", reached=False)
        kept = [(key.lower(), value) for key, value in answer.headers if key.lower() not in OF_THE_ANSWER]
        await send({"type": "http.response.start", "status": answer.status, "headers": [*kept, *answer_headers]})
        await _stream(
            answer, send, on_first, deadlines.between, events=dict(kept).get(b"content-type", b"").startswith(EVENTS)
        )


async def _stream(answer: Answer, send: Send, on_first: Callable[[], None], between: float, *, events: bool) -> None:
    last = b""
    while True:
        try:
            if between:
                async with asyncio.timeout(between):
                    piece = await answer.read()
            else:
                piece = await answer.read()
        except (LinkLostError, TimeoutError) as error:
            if not events:
                raise
            late = isinstance(error, TimeoutError)
            why = "paused for too long (LLMRUN_IDLE_STREAM_TIMEOUT)" if late else "went away: `llmrun logs` says why"
            await send({"type": "http.response.body", "body": broken_off(last, why)})
            return
        if not last:
            on_first()
        await send({"type": "http.response.body", "body": piece, "more_body": bool(piece)})
        if not piece:
            return
        last = piece


def broken_off(last: bytes, why: str) -> bytes:
    """The event that ends a stream whose engine is gone, after its `last` piece."""
    body = error_body(f"the stream ends early: its engine {why}", "service_unavailable", "stream_broken_off")
    event = b"data: " + json.dumps(body).encode() + b"\n\n"
    return event if not last or last.endswith(b"\n\n") else b"\n\n" + event


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises Refusal above `limit` bytes, before it is read where its length is said."""
    too_large = HTTPError(413, f"the body is over {limit >> 20} MiB", "body_too_large")
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

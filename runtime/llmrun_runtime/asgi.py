"""The few ASGI words that the shim, the ingress and control share."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]


async def answer(send: Send, status: int, content: Any, headers: Headers = ()) -> None:
    """Send a whole JSON answer."""
    await answer_bytes(send, status, json.dumps(content, ensure_ascii=False).encode(), "application/json", headers)


async def answer_bytes(send: Send, status: int, body: bytes, content_type: str, headers: Headers = ()) -> None:
    """Send a whole answer."""
    sent = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})


async def answer_error(
    send: Send, status: int, text: str, kind: str, code: str, param: str | None = None, headers: Headers = ()
) -> None:
    """Send an error in OpenAI's shape."""
    await answer(send, status, error_body(text, kind, code, param), headers)


def error_body(text: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}

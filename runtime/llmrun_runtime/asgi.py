"""ASGI types and response functions that the shim, the ingress and control share."""

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


async def send_json(send: Send, status: int, content: Any, headers: Headers = ()) -> None:
    """Send a complete JSON response."""
    await send_bytes(send, status, json.dumps(content, ensure_ascii=False).encode(), "application/json", headers)


async def send_bytes(send: Send, status: int, body: bytes, content_type: str, headers: Headers = ()) -> None:
    """Send a complete response."""
    sent = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})


async def send_error(
    send: Send, status: int, message: str, kind: str, code: str, param: str | None = None, headers: Headers = ()
) -> None:
    """Send an error in OpenAI's shape."""
    await send_json(send, status, error_body(message, kind, code, param), headers)


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's shape; `kind` is its `type`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

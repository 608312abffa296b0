"""Records the changes that go through the API in the audit log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request

from llmrun.wire import BY_HEADER, CONTROL_ROOT, AuditRow
from llmrun_runtime.asgi import App, Receive, Scope, Send
from llmrun_runtime.control.api.auth import key_of
from llmrun_runtime.control.audit import AuditLog
from llmrun_runtime.wire.headers import CLIENT_HEADER

READS = ("GET", "HEAD", "OPTIONS")
NO_CHANGE = (f"{CONTROL_ROOT}/plan",)
MAX_BY = 128
_SUBJECT = "llmrun.subject"


async def _subject(request: Request) -> Callable[[str], None]:
    names: list[str] = request.scope[_SUBJECT]
    return names.append


Subject = Annotated[Callable[[str], None], Depends(_subject)]
"""Call it with the name of what a request changes, if its path does not have it."""


class Audited:
    """ASGI middleware, within `Access`."""

    def __init__(self, app: App, audit: AuditLog) -> None:
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and record it if it is a change, whatever its result is."""
        if scope["type"] != "http" or scope["method"] in READS or scope["path"] in NO_CHANGE:
            await self._app(scope, receive, send)
            return
        subjects: list[str] = []
        scope[_SUBJECT] = subjects
        status = 0

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = dict(scope["headers"])
        try:
            await self._app(scope, receive, noted)
        finally:
            row = AuditRow(
                at=time.time(),
                who=key_of(scope).name,
                by=headers.get(BY_HEADER.lower().encode(), b"").decode("latin-1")[:MAX_BY],
                client=headers.get(CLIENT_HEADER.encode(), b"").decode("latin-1") or (scope.get("client") or ("",))[0],
                action=f"{scope['method']} {scope['path'].removeprefix(CONTROL_ROOT)}",
                subject=", ".join(subjects),
                status=status,
                request=headers.get(b"x-request-id", b"").decode("latin-1")[:MAX_BY],
            )
            await asyncio.to_thread(self._audit.write, row)

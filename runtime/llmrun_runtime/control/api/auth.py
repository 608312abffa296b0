"""Access control of the API: every request needs the admin key, since a deploy runs code. The place to add roles."""

from __future__ import annotations

import hmac

from llmrun_runtime.asgi import App, Receive, Scope, Send, send_error

PUBLIC_PATHS = frozenset({"/metrics"})  # Prometheus sends no key
HINT = "set LLMRUN_ADMIN_KEY to the content of `admin.key` in the head node's LLMRUN_HOME"


class AdminKey:
    """ASGI middleware: responds 401 to requests without the admin key."""

    def __init__(self, app: App, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the `Authorization` header."""
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            header = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(header, self._expected):
                problem = "invalid admin key" if header else "an admin key is required"
                await send_error(send, 401, f"{problem}: {HINT}", "authentication_error", "invalid_admin_key")
                return
        await self._app(scope, receive, send)

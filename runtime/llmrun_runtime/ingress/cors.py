"""CORS: lets web pages of other origins call the ingress if LLMRUN_CORS_ORIGINS is set."""

from __future__ import annotations

from typing import Any, cast

from starlette.middleware.cors import CORSMiddleware

from llmrun.wire import CONTROL_ROOT
from llmrun_runtime.asgi import App, Receive, Scope, Send
from llmrun_runtime.ingress.admission.browser import listed

NOT_FOR_PAGES = frozenset({"/", "/health", "/ready", "/metrics", "/openapi.json"})
EXPOSED = ("x-request-id", "request-id", "retry-after")


def with_cors(app: App, origins: str) -> App:
    """Wrap the app in Starlette's CORS middleware, but for NOT_FOR_PAGES; `origins`: a comma-separated list, or `*`."""
    rate_limits = [
        f"x-ratelimit-{field}-{kind}" for field in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
    ]
    cors: Any = CORSMiddleware(
        cast(Any, app),
        allow_origins=listed(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[*EXPOSED, *rate_limits],
    )

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        is_own = scope["path"] in NOT_FOR_PAGES or scope["path"].startswith(CONTROL_ROOT + "/")
        await (app if is_own else cors)(scope, receive, send)

    return dispatch

"""Lets web pages of other origins call the ingress, where that was set."""

from __future__ import annotations

from typing import Any, cast

from starlette.middleware.cors import CORSMiddleware

from llmrun_runtime.asgi import App

EXPOSED = ("x-request-id", "retry-after")


def with_cors(app: App, origins: str) -> App:
    """The app behind Starlette's CORS; `origins` with commas between, or `*`."""
    allowed = [origin.strip().rstrip("/") for origin in origins.split(",") if origin.strip()]
    limits = [
        f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
    ]
    cors: Any = CORSMiddleware(
        cast(Any, app),
        allow_origins=allowed,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[*EXPOSED, *limits],
    )
    return cast(App, cors)

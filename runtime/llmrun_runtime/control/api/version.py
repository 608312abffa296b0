"""Tells clients the cluster's release, so that a client of another one can say why it is refused."""

from __future__ import annotations

from typing import Any

import llmrun
from llmrun.wire import VERSION_HEADER
from llmrun_runtime.asgi import App, Receive, Scope, Send

HEADER = (VERSION_HEADER.encode(), llmrun.__version__.encode())


def with_version(app: App) -> App:
    """Return the app with the release in the headers of all its responses."""

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_version(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), HEADER]}
            await send(message)

        await app(scope, receive, send_with_version)

    return respond

"""Withholds what a server sends once its engine has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmrun_runtime.asgi import App, Message, Receive, Scope, Send, send_error
from llmrun_runtime.wire.headers import DIED, GONE_HEADER


class EngineEndedError(Exception):
    """The engine ended while it answered. The connection must fail, so that nobody takes the answer for complete."""


async def guarded(app: App, has_ended: Callable[[Any], bool], scope: Scope, receive: Receive, send: Send) -> None:
    """Run `app`, and pass on nothing that it sends after its engine has ended.

    vLLM's server outlives its engine core for a moment. It then answers 500, and ends streams with `[DONE]`. Neither is
    the engine's answer: a response that has not started becomes a 503 that tells the ingress so, one that has started
    raises EngineEndedError.
    """
    started = ended = complete = False

    async def send_if_alive(message: Message) -> None:
        nonlocal started, ended, complete
        if ended or has_ended(scope.get("app")):
            ended = True
            raise EngineEndedError("the engine has ended")
        started = True
        complete = message["type"] == "http.response.body" and not message.get("more_body")
        await send(message)

    try:
        await app(scope, receive, send_if_alive)
    except Exception:
        ended = ended or (not complete and has_ended(scope.get("app")))
        if not ended:
            raise
    if not ended:
        return
    if started:
        raise EngineEndedError("the engine ended while it answered")
    died = [(GONE_HEADER.encode(), DIED.encode())]
    text = "the engine died while it ran the request"
    await send_error(send, 503, text, "service_unavailable", "replica_gone", headers=died)

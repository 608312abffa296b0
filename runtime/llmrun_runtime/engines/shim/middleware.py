"""The shim: a small ASGI middleware around the engine's app, in the engine's process.

Accepts only requests with the replica's token, runs the user's hooks, counts requests in flight and their usage, and
notifies the replica when the engine is ready. Does not depend on the engine's type.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import time
from pathlib import Path
from typing import Any

from llmrun.context import RequestContext
from llmrun.errors import HookError
from llmrun_runtime.asgi import App, Message, Receive, Scope, Send, send_error, send_json
from llmrun_runtime.engines.base import SHIM_ENV, TOKEN_ENV, ShimConfig
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.engines.shim import lease, usage_meter
from llmrun_runtime.engines.shim.adapter_slots import AdapterError, AdapterSlots
from llmrun_runtime.engines.shim.canary import Canary
from llmrun_runtime.engines.shim.engine_guard import guarded
from llmrun_runtime.engines.shim.forms import Form
from llmrun_runtime.engines.shim.hooks import Hooks
from llmrun_runtime.link.server import listen
from llmrun_runtime.wire.headers import (
    ADAPTER_HEADER,
    GONE_HEADER,
    KEY_HEADER,
    LEAVE_PATH,
    PROBE_HEADER,
    PROBE_PREFIX,
    SINCE,
    STATE_PATH,
    TOKEN_HEADER,
)

# The request then fails with 503. The fetch continues, and a retry finds the adapter or waits for the same fetch.
FETCH_TIMEOUT_S = 30
RETRY_AFTER_S = b"5"
UNCOUNTED = ("/health", "/metrics", "/ping", "/load", "/version")


class Shim:
    """`Shim(app)` is an ASGI app. It reads its configuration from the engine's environment."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._token = os.environ[TOKEN_ENV].encode()
        config = ShimConfig.from_json(os.environ[SHIM_ENV])
        self._hooks = Hooks(config) if config.hooks else None
        self._config = config
        self._engine_has_ended = get_engine(config.engine).has_ended
        self._adapters: AdapterSlots | None = None
        self._links: asyncio.Server | None = None
        self._in_flight = 0
        self._leaving = False
        self._probes_in_flight = 0
        self._paths: list[str] = []
        self._served = 0
        self._last_end = self._busy_since = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Authenticate, count and serve one request; start hooks, adapters and links with the app's lifespan."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._on_startup(scope, send))
            return
        headers = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(TOKEN_HEADER.encode(), b""), self._token):
            await self._refuse_unauthenticated(scope, send)
            return
        if scope["path"] == STATE_PATH:
            await send_json(send, 200, self._state(scope))
            return
        if scope["path"] == LEAVE_PATH:
            self._leaving = not self._in_flight
            await send_json(send, 200, self._state(scope))
            return
        if scope["path"].startswith(PROBE_PREFIX):
            path = scope["path"].removeprefix(PROBE_PREFIX)
            await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, send)
            return
        if scope["path"] in UNCOUNTED:
            await self._app(scope, receive, send)
            return
        if self._leaving or self._engine_has_ended(scope.get("app")):
            gone = [(GONE_HEADER.encode(), b"1")]
            text = "this replica is shutting down: retry through the ingress"
            await send_error(send, 503, text, "service_unavailable", "replica_gone", headers=gone)
            return
        probe = PROBE_HEADER.encode() in headers
        if not self._in_flight:
            self._busy_since = time.monotonic()
        self._in_flight += 1
        self._probes_in_flight += probe
        try:
            if self._hooks and scope.get("method") == "POST":
                try:
                    receive = await self._apply_hooks(self._hooks, scope, receive)
                except HookError as error:
                    await send_error(send, 500, str(error), "hook_error", "hook_failed")
                    return
                except ValueError as error:  # what no hook has seen must not reach the engine
                    text = f"request body is not a valid multipart form: {error}"
                    await send_error(send, 400, text, "invalid_request_error", "invalid_form")
                    return
            with usage_meter.metered(headers.get(KEY_HEADER.encode(), b"").decode("latin-1")):
                if adapter := headers.get(ADAPTER_HEADER.encode()):
                    await self._serve_with_adapter(adapter.decode("latin-1"), scope, receive, send)
                else:
                    await self._serve(scope, receive, send)
        finally:
            self._in_flight -= 1
            self._probes_in_flight -= probe
            self._served += 1
            if not probe:
                self._last_end = time.monotonic()

    def _on_startup(self, scope: Scope, send: Send) -> Send:
        """Return a `send` that, after the engine's startup, starts hooks and links, then notifies the replica."""

        async def send_startup(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                try:
                    if self._hooks:
                        await self._hooks.start()
                    if self._config.max_loaded:
                        loader = get_engine(self._config.engine).loader(scope["app"], self._config.max_lora_rank)
                        canary = Canary(Path(self._config.canary)).check if self._config.canary else None
                        self._adapters = AdapterSlots(loader, self._config.max_loaded, _fetch_adapter, canary)
                except HookError as error:
                    lease.notify(failed=str(error))
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                # The outermost app, as the engine's own HTTP server calls it; it calls this shim.
                app = scope.get("app") or self
                credential = (TOKEN_HEADER.encode(), self._token)
                self._links = await listen(app, self._config.host, scope.get("state"), credential=credential)
                lease.notify(ready=True, link=self._links.sockets[0].getsockname()[1])
            await send(message)

        return send_startup

    def _state(self, scope: Scope) -> dict[str, Any]:
        self._paths = self._paths or _post_paths(scope.get("app"))
        now = time.monotonic()
        idle = 0.0 if self._in_flight > self._probes_in_flight else now - self._last_end
        stalled = now - max(self._busy_since, usage_meter.last_output()) if self._in_flight else 0.0
        return {
            "in_flight": self._in_flight,
            "served": self._served,
            "idle_s": round(idle, 3),
            "stalled_s": round(stalled, 3),
            "paths": self._paths,
            "adapters": self._adapters.loaded() if self._adapters else [],
            **usage_meter.snapshot(_since(scope)),
        }

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        await guarded(self._app, self._engine_has_ended, scope, receive, send)

    async def _serve_with_adapter(self, adapter: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request with an adapter. `adapter`: its name and its pin, from the ingress."""
        name, _, pin = adapter.partition(" ")
        try:
            if not self._adapters:
                raise AdapterError("this engine was started without adapters", 404)
            async with self._adapters.using(name, pin):
                await self._serve(scope, receive, send)
        except AdapterError as error:
            kind, code = (
                ("invalid_request_error", "adapter_invalid")
                if error.status == 400
                else ("service_unavailable", "adapter_not_ready")
            )
            headers = [] if error.status == 400 else [(b"retry-after", RETRY_AFTER_S)]
            text = f"adapter {name} of {self._config.model}: {error}"
            await send_error(send, error.status, text, kind, code, "model", headers)

    async def _apply_hooks(self, hooks: Hooks, scope: Scope, receive: Receive) -> Receive:
        """Read the body and apply the hooks to a JSON object or a form; return a `receive` that yields the result.

        The client writes the content type, so it must not decide whether hooks run. Raises HookError, or ValueError for
        a form that cannot be read.
        """
        content, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return _replay(message, receive)
            content += message.get("body", b"")
            more = message.get("more_body", False)
        body = bytes(content)
        headers = dict(reversed(scope["headers"]))  # of a repeated one the first, as the engine
        try:
            request = json.loads(body)
        except ValueError:
            request = None
        form = None if isinstance(request, dict) else Form.parse(headers.get(b"content-type", b""), body)
        context = RequestContext(
            path=scope["path"],
            key=headers.get(KEY_HEADER.encode(), b"").decode("latin-1"),
            adapter=headers.get(ADAPTER_HEADER.encode(), b"").decode("latin-1").partition(" ")[0],
            form=form is not None,
        )
        changed: list[tuple[bytes, bytes]] = []
        if form:
            content_type, body = form.encode(await hooks.apply(form.fields, context))
            changed.append((b"content-type", content_type))
        elif isinstance(request, dict):  # the engine rejects anything else
            body = await hooks.apply_to_json(request, context)
        changed.append((b"content-length", str(len(body)).encode()))
        names = {name for name, _ in changed}
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name not in names] + changed
        return _replay({"type": "http.request", "body": body, "more_body": False}, receive)

    async def _refuse_unauthenticated(self, scope: Scope, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        text = "this is an llmrun replica: send requests to its ingress"
        await send_error(send, 401, text, "authentication_error", "invalid_token")


async def _fetch_adapter(name: str, pin: str) -> Path:
    """Have the replica fetch an adapter; return its folder on this node. Raises AdapterError."""
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            reply = await asyncio.wrap_future(lease.request(adapter=name, pin=pin))
    except TimeoutError:
        text = f"fetching it timed out after {FETCH_TIMEOUT_S} s: its object store is slow or not reachable"
        raise AdapterError(text, 503) from None
    if "error" in reply:
        raise AdapterError(reply["error"], 503)
    return Path(reply["path"])


def _since(scope: Scope) -> int:
    """Return `since` of the query: the number of the last snapshot of counts that the replica received; 0: none."""
    value: bytes = scope.get("query_string", b"").removeprefix(SINCE.encode() + b"=")
    return int(value) if value.isdigit() else 0


def _post_paths(app: Any) -> list[str]:
    """Return the paths of a Starlette app that accept POST; empty for other apps."""
    routes = [route for route in getattr(app, "routes", ()) if "POST" in (getattr(route, "methods", None) or ())]
    return sorted({route.path for route in routes})


def _replay(first: Message, receive: Receive) -> Receive:
    pending = [first]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed

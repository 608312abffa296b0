"""The ingress as an ASGI app: paths to answers. Admission, waiting, routing and relaying have rooms of their own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

import aiohttp
from prometheus_client import CONTENT_TYPE_LATEST

import llmrun
from llmrun.settings import Settings
from llmrun.wire import CONTROL_ROOT, KeyInfo
from llmrun_runtime.asgi import Receive, Scope, Send, answer, answer_bytes, answer_error
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.ingress.admission.admit import Target, check_path, find_target
from llmrun_runtime.ingress.admission.auth import check_awake, check_seen, find_key, may_see
from llmrun_runtime.ingress.admission.rate_limits import Limiter, limits_of
from llmrun_runtime.ingress.admission.request import check_method, read_max_wait, read_request
from llmrun_runtime.ingress.endpoints.control_proxy import WITH_BODY, new_session, pass_on
from llmrun_runtime.ingress.endpoints.metrics import IngressMetrics, RequestRecord
from llmrun_runtime.ingress.endpoints.models import MODELS, describe, list_models
from llmrun_runtime.ingress.endpoints.openapi import openapi
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.queue.caller_wait import CallerWait
from llmrun_runtime.ingress.queue.keepalive import KeepaliveStream
from llmrun_runtime.ingress.queue.request_queue import Caller, Claim, RequestQueue
from llmrun_runtime.ingress.relay import Deadlines, UpstreamGone, forwarded_headers, read_body, relay
from llmrun_runtime.link.client import Links
from llmrun_runtime.wire.headers import ADAPTER_HEADER, KEY_HEADER, PROBE_HEADER, TOKEN_HEADER
from llmrun_runtime.wire.reports import AdapterRevision

log = logging.getLogger("llmrun.ingress")
# Known even while nothing is deployed, so that a request hears that rather than of a wrong path.
USUAL_PATHS = get_engine("vllm").paths
# What the engine must not see of the caller's: its key, and what only we say.
PRIVATE = frozenset(
    {b"authorization", b"x-api-key", b"x-request-id"}
    | {name.encode() for name in (TOKEN_HEADER, KEY_HEADER, PROBE_HEADER, ADAPTER_HEADER)}
)


Revise = Callable[[str, str], Awaitable[AdapterRevision]]
"""Asks control for `adapter@revision` of a model."""


class Ingress:
    """`Ingress(settings, …)` is an ASGI app; `close` it at the end. `keys_only`: no key, no way in."""

    def __init__(
        self,
        settings: Settings,
        waiting: RequestQueue,
        limiter: Limiter,
        metrics: IngressMetrics,
        revise: Revise,
        *,
        keys_only: bool = False,
    ) -> None:
        self._settings = settings
        self._deadlines = Deadlines(settings.first_byte_timeout, settings.idle_stream_timeout)
        self._waiting = waiting
        self._limiter = limiter
        self._keys_only = keys_only
        self._metrics = metrics
        self._revise = revise
        self._links = Links(settings.connect_timeout)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Let go of connections."""
        self._links.close()
        if self._session:
            await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request = RequestRecord(given if given.isprintable() and 0 < len(given) <= 128 else uuid.uuid4().hex)
        headers = [(b"x-request-id", request.id.encode("latin-1"))]

        async def watched(message: Any) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
            await send(message)

        try:
            await self._dispatch(scope, receive, watched, request)
        except HTTPError as refusal:
            if refusal.retry_after is not None:
                headers.append((b"retry-after", str(refusal.retry_after).encode()))
            headers += request.headers
            await answer(watched, refusal.status, refusal.body(), headers)
        except Exception as error:
            if request.status:
                raise  # the server closes the connection: nobody takes half an answer for a whole one
            log.exception("request %s failed", request.id)
            text = f"the ingress failed ({type(error).__name__}); its log has request {request.id}"
            await answer_error(watched, 500, text, "internal_error", "internal_error", headers=headers)
        finally:
            if request.path:
                self._metrics.ended(request)
                log.info("%s", request)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send, request: RequestRecord) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/health":
            await answer(send, 200, {"status": "ok", "version": llmrun.__version__})
        elif path == "/openapi.json":
            await answer(send, 200, openapi(USUAL_PATHS))
        elif path == MODELS or path.startswith(MODELS + "/"):
            check_method(method, path, "GET", "HEAD")
            await self._models(scope, path, send)
        elif path == "/metrics":
            check_method(method, path, "GET", "HEAD")
            text = await self._metrics.gather(self._http(), self._links)
            await answer_bytes(send, 200, text, CONTENT_TYPE_LATEST)
        elif path.startswith(CONTROL_ROOT + "/"):
            await self._control(scope, receive, send)
        else:
            models = self._waiting.table.models.values()
            if path not in USUAL_PATHS and not any(path in model.paths for model in models):
                raise HTTPError(404, f"there is no {path} here", "path_not_found")
            check_method(method, path, "POST")
            await self._infer(scope, receive, send, request)

    def _key(self, scope: Scope) -> KeyInfo | None:
        return find_key(self._waiting.table, scope, time.time(), required=self._keys_only)

    async def _models(self, scope: Scope, path: str, send: Send) -> None:
        key, table = self._key(scope), self._waiting.table
        if path == MODELS:
            body = await list_models(table.models.values(), partial(may_see, key))
            await answer_bytes(send, 200, body, "application/json")
        else:
            name = path.removeprefix(MODELS + "/")
            target = find_target(table, name, partial(may_see, key))
            check_seen(key, target.model, target.adapter)
            await self._pinned(target)
            await answer(send, 200, describe(target.model, name))

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        host, port = self._waiting.table.control
        try:
            work = pass_on(self._http(), scope, receive, send, f"http://{host}:{port}{scope['path']}")
            await (work if scope["method"] in WITH_BODY else _unless_gone(work, receive))
        except UpstreamGone as error:
            text = f"control does not answer ({error}): it is being restarted, try again in a few seconds"
            raise HTTPError(503, text, "control_away", "service_unavailable", retry_after=2) from None

    async def _infer(self, scope: Scope, receive: Receive, send: Send, request: RequestRecord) -> None:
        request.path = scope["path"]
        key = self._key(scope)
        request.key = key.name if key else ""
        body = await read_body(scope, receive, self._settings.max_body_bytes)
        asked = read_request(body, dict(scope["headers"]).get(b"content-type", b""))
        limit = read_max_wait(scope)
        target = find_target(self._waiting.table, asked.model, partial(may_see, key))
        model = target.model
        check_seen(key, model, target.adapter)
        check_path(model, scope["path"])
        check_awake(key, model)
        request.model, request.adapter = model.name, self._metrics.adapter(model.name, target.adapter)
        limits = limits_of(key, model)
        early = KeepaliveStream(send, [(b"x-request-id", request.id.encode("latin-1"))])

        async def ask() -> None:
            pinned = await self._pinned(target)
            probe = key is not None and not key.wake
            caller = Caller(request.key, probe, asked.prefix, pinned.pin, request.adapter)
            patience = CallerWait(self._waiting, target.name, limit, early if asked.stream else None, caller)
            headers = _asked_as(scope, request, caller, pinned)
            if asked.mended:
                headers = [(name, value) for name, value in headers if name != "content-length"]
            await self._ask(scope, early, patience, headers, asked.mended or body, request)

        try:
            with self._limiter.entered(limits, time.time()):
                request.headers = self._limiter.headers(limits, time.time())
                await _unless_gone(self._in_time(ask()), receive)
        except HTTPError as refusal:
            request.headers = self._limiter.headers(limits, time.time())
            if early.started and not early.events:
                raise ConnectionAbortedError(refusal.text) from None
            if not early.started:
                raise
            await early.refuse(refusal)

    async def _pinned(self, target: Target) -> Target:
        """The target with its pin: a revision that was not asked for lately is asked of control. Raises Refusal."""
        if target.pin or not target.adapter:
            return target
        found = await self._revise(target.model.name, target.adapter)
        called = f"{target.model.name}:{target.adapter}"
        if found.missing:
            text = f"the model {called!r} does not exist: {found.trouble}"
            raise HTTPError(404, text, "model_not_found", param="model")
        if not found.pin:
            text = f"what {called} means is not known: {found.trouble}"
            raise HTTPError(503, text, "adapters_unknown", "service_unavailable", param="model", retry_after=5)
        return replace(target, pin=found.pin)

    async def _in_time(self, work: Coroutine[Any, Any, None]) -> None:
        """Raises Refusal if a request takes longer than any may."""
        limit = self._settings.request_timeout
        if not limit:
            await work
            return
        try:
            async with asyncio.timeout(limit):
                await work
        except TimeoutError:
            text = f"the request took longer than {limit:g} s (LLMRUN_REQUEST_TIMEOUT)"
            raise HTTPError(504, text, "request_timeout", "service_unavailable") from None

    async def _ask(
        self,
        scope: Scope,
        send: KeepaliveStream,
        patience: CallerWait,
        headers: list[tuple[str, str]],
        body: bytes,
        request: RequestRecord,
    ) -> None:
        """Wait for a replica and relay; go to another one if it is gone before its first byte."""
        answer_headers = [(b"x-request-id", request.id.encode("latin-1")), *request.headers]
        failed: list[str] = []
        for attempt in itertools.count():
            claim = await patience.claim(failed)
            with self._waiting.in_flight(claim):
                try:
                    check_path(self._waiting.table.models.get(claim.model), scope["path"])  # known since it woke

                    def first(claim: Claim = claim) -> None:
                        request.first_byte = time.monotonic()
                        request.streams = send.streams
                        self._waiting.answered(claim)

                    token = (TOKEN_HEADER, claim.replica.token)
                    asked = (scope, send, [*headers, token], body, answer_headers, first, self._deadlines)
                    await relay(self._links, claim.replica, *asked)
                    return
                except UpstreamGone as error:
                    log.warning("request %s: replica %s is gone: %s", request.id, claim.replica.id[:12], error)
                    failed.append(claim.replica.id)
                    # What never reached an engine may be tried until it does; what did, once more.
                    if error.reached and attempt:
                        text = f"a replica of {claim.model} went away before it answered, twice: `llmrun logs` says why"
                        raise HTTPError(503, text, "replica_gone", "service_unavailable", retry_after=5) from None

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = new_session()
        return self._session


def _asked_as(scope: Scope, request: RequestRecord, caller: Caller, target: Target) -> list[tuple[str, str]]:
    """The headers that an engine gets: the client's, and what it must know beside."""
    more = [("x-request-id", request.id), (KEY_HEADER, caller.key)]
    more += [(PROBE_HEADER, "1")] if caller.probe else []
    more += [(ADAPTER_HEADER, f"{target.adapter} {target.pin}")] if target.adapter else []
    return [*forwarded_headers(scope, PRIVATE), *more]


async def _unless_gone(work: Any, receive: Receive) -> None:
    """Do `work` unless the client leaves first; then it is cancelled, and with it the engine's."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for future in (task, gone):
            future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)

"""The ingress as an ASGI app: paths to answers. Admission, waiting, routing and relaying have rooms of their own."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import uuid
from typing import Any

import aiohttp

import llmrun
from llmrun.settings import Settings
from llmrun.wire import CONTROL_ROOT
from llmrun_runtime.asgi import Receive, Scope, Send, answer, answer_error
from llmrun_runtime.engines.base import TOKEN_HEADER
from llmrun_runtime.engines.kinds import get_engine
from llmrun_runtime.ingress.admission import Refusal, check_path, find_model, read_max_wait, read_request
from llmrun_runtime.ingress.early import EarlyStream
from llmrun_runtime.ingress.patience import Patience
from llmrun_runtime.ingress.relay import UpstreamGone, forwarded_headers, new_session, read_body, relay, stream_body
from llmrun_runtime.ingress.waiting import Waiting
from llmrun_runtime.table import ModelRoute

log = logging.getLogger("llmrun.ingress")
MODELS = "/v1/models"
# Known even while nothing is deployed, so that a request hears that rather than of a wrong path.
USUAL_PATHS = get_engine("vllm").paths
# What the engine must not see: the caller's key, and our own token's name.
PRIVATE = frozenset({b"authorization", b"x-api-key", TOKEN_HEADER.encode()})


class Ingress:
    """`Ingress(settings, waiting)` is an ASGI app; `close` it at the end."""

    def __init__(self, settings: Settings, waiting: Waiting) -> None:
        self._limit = settings.max_body_bytes
        self._waiting = waiting
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Let go of connections."""
        if self._session:
            await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Any) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if given.isprintable() and 0 < len(given) <= 128 else uuid.uuid4().hex
        try:
            await self._dispatch(scope, receive, watched, request_id)
        except Refusal as refusal:
            headers = [(b"x-request-id", request_id.encode("latin-1"))]
            if refusal.retry_after is not None:
                headers.append((b"retry-after", str(refusal.retry_after).encode()))
            await answer_error(send, refusal.status, refusal.text, refusal.kind, refusal.code, refusal.param, headers)
        except Exception as error:
            if started:
                raise  # the server closes the connection: nobody takes half an answer for a whole one
            log.exception("request %s failed", request_id)
            text = f"the ingress failed ({type(error).__name__}); its log has request {request_id}"
            await answer_error(send, 500, text, "internal_error", "internal_error")

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/health":
            await answer(send, 200, {"status": "ok", "version": llmrun.__version__})
        elif path == MODELS or path.startswith(MODELS + "/"):
            if method not in ("GET", "HEAD"):
                raise Refusal(405, f"{path} takes GET", "method_not_allowed")
            await self._models(path, send)
        elif path.startswith(CONTROL_ROOT + "/") or path == "/metrics":
            if path == "/metrics" and method not in ("GET", "HEAD"):
                raise Refusal(405, f"{path} takes GET", "method_not_allowed")
            await self._control(scope, receive, send)
        else:
            models = self._waiting.table.models.values()
            if path not in USUAL_PATHS and not any(path in model.paths for model in models):
                raise Refusal(404, f"there is no {path} here", "path_not_found")
            if method != "POST":
                raise Refusal(405, f"{path} takes POST", "method_not_allowed")
            await self._infer(scope, receive, send, request_id)

    async def _models(self, path: str, send: Send) -> None:
        table = self._waiting.table
        if path == MODELS:
            data = [_describe(model, model.name) for model in table.models.values()]
            await answer(send, 200, {"object": "list", "data": data})
        else:
            name = path.removeprefix(MODELS + "/")
            await answer(send, 200, _describe(find_model(table, name), name))

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        host, port = self._waiting.table.control
        body = stream_body(receive) if scope["method"] in ("POST", "PUT", "PATCH") else None
        try:
            url = f"http://{host}:{port}{scope['path']}"
            work = relay(self._http(), scope, send, url, forwarded_headers(scope), body, [])
            await (_unless_gone(work, receive) if body is None else work)
        except UpstreamGone as error:
            text = f"control does not answer ({error}): it is being restarted, try again in a few seconds"
            raise Refusal(503, text, "control_away", "service_unavailable", retry_after=2) from None

    async def _infer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        body = await read_body(scope, receive, self._limit)
        asked = read_request(body)
        limit = read_max_wait(scope)
        check_path(find_model(self._waiting.table, asked.model), scope["path"])
        early = EarlyStream(send, [(b"x-request-id", request_id.encode("latin-1"))])
        patience = Patience(self._waiting, asked.model, limit, early if asked.stream else None)
        try:
            await _unless_gone(self._ask(scope, early, patience, body, request_id), receive)
        except Refusal as refusal:
            if not early.opened:
                raise
            await early.refuse(refusal)

    async def _ask(self, scope: Scope, send: Send, patience: Patience, body: bytes, request_id: str) -> None:
        """Wait for a replica and relay; go to another one if it is gone before its first byte."""
        headers = [*forwarded_headers(scope, PRIVATE | {b"x-request-id"}), ("x-request-id", request_id)]
        answer_headers = [(b"x-request-id", request_id.encode("latin-1"))]
        failed: list[str] = []
        for attempt in itertools.count():
            claim = await patience.claim(failed)
            url = f"http://{claim.replica.host}:{claim.replica.port}{scope['path']}"
            with self._waiting.in_flight(claim):
                try:
                    token = (TOKEN_HEADER, claim.replica.token)
                    first = functools.partial(self._waiting.answered, claim)
                    await relay(self._http(), scope, send, url, [*headers, token], body, answer_headers, first)
                    return
                except UpstreamGone as error:
                    log.warning("request %s: replica %s is gone: %s", request_id, claim.replica.id[:12], error)
                    failed.append(claim.replica.id)
                    # What never reached an engine may be tried until it does; what did, once more.
                    if error.reached and attempt:
                        text = f"a replica of {claim.model} went away before it answered, twice: `llmrun logs` says why"
                        raise Refusal(503, text, "replica_gone", "service_unavailable", retry_after=5) from None

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = new_session()
        return self._session


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


def _describe(model: ModelRoute, name: str) -> dict[str, Any]:
    """A model as OpenAI lists it, with what llmrun knows beside."""
    more = {"state": model.state, "app": model.app, "version": model.version, "aliases": list(model.names[1:])}
    return {"id": name, "object": "model", "created": model.created, "owned_by": "llmrun", "llmrun": more}

"""The ingress as an ASGI app: dispatches paths and sends errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import aiohttp
from prometheus_client import CONTENT_TYPE_LATEST

import llmrun
from llmrun.identity import CHALLENGE_HEADER, MAX_CHALLENGE, PROOF_HEADER, digest_of, prove
from llmrun.settings import Settings
from llmrun.wire import CONTROL_ROOT, KeyInfo
from llmrun_runtime.asgi import Receive, Scope, Send, send_bytes, send_json
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.ingress.admission.admin_access import check_admin_access
from llmrun_runtime.ingress.admission.auth import authenticate, bearer_token, can_access, check_operator, is_operator
from llmrun_runtime.ingress.admission.browser import check_browser, check_content_type, names
from llmrun_runtime.ingress.admission.paths import canonical_path, path_not_found
from llmrun_runtime.ingress.admission.rate_limits import Limiter
from llmrun_runtime.ingress.admission.request import check_headers, check_method
from llmrun_runtime.ingress.admission.revision import Resolver, resolve_pin
from llmrun_runtime.ingress.admission.target import find_target
from llmrun_runtime.ingress.disconnect import cancel_on_disconnect
from llmrun_runtime.ingress.endpoints.control_proxy import METHODS_WITH_BODY, forward, new_session
from llmrun_runtime.ingress.endpoints.metrics import IngressMetrics
from llmrun_runtime.ingress.endpoints.models import MODELS, describe, list_models
from llmrun_runtime.ingress.endpoints.openapi import openapi
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.inference import Inference
from llmrun_runtime.ingress.queue.keepalive import DEFAULT_TIMING, KeepaliveTiming
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.ingress.readiness import Readiness
from llmrun_runtime.ingress.relay import UpstreamUnavailable
from llmrun_runtime.ingress.request_record import RequestRecord, new_record
from llmrun_runtime.link.client import Links

log = logging.getLogger("llmrun.ingress")
# Below the shortest interval at which Prometheus scrapes (1 s): each scrape gets a new page.
METRICS_KEPT_S = 0.5
# Valid even while nothing is deployed, so that the error is about the model and not about the path.
USUAL_PATHS = get_engine("vllm").paths


class Ingress:
    """The ASGI app; call `close` at the end.

    `keys_only`: require an API key even while none exists. `admin_host`: see `check_admin_access`.
    """

    def __init__(
        self,
        settings: Settings,
        queue: RequestQueue,
        limiter: Limiter,
        metrics: IngressMetrics,
        resolver: Resolver,
        readiness: Readiness,
        *,
        keys_only: bool = False,
        admin_host: str = "",
        keepalive: KeepaliveTiming = DEFAULT_TIMING,
    ) -> None:
        self._queue = queue
        self._admin_host = admin_host
        self._keys_only = keys_only or settings.require_key is True
        self._hosts, self._origins = names(settings.allowed_hosts), names(settings.cors_origins)
        self._metrics_token = settings.metrics_token
        self._gathering = asyncio.Lock()
        self._gathered, self._page = -math.inf, b""
        self._metrics = metrics
        self._resolver = resolver
        self._readiness = readiness
        self.answering = 0
        """The number of inference requests that are being answered or are waiting for a replica."""
        self._links = Links(settings.connect_timeout)
        self._session: aiohttp.ClientSession | None = None
        self._infer = Inference(settings, queue, limiter, metrics, resolver, self._links, keepalive)

    async def close(self) -> None:
        """Close all connections to engines and control."""
        self._links.close()
        if self._session:
            await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        record = new_record(scope)

        async def recorded(message: Any) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        try:
            await self._dispatch(scope, receive, recorded, record)
        except HTTPError as full:
            error = record.shown(full)
            headers = [*record.shape.headers(), *error.headers(), *record.rate_limit_headers]
            await send_json(recorded, error.status, record.shape.body(error), headers)
        except Exception as error:
            if record.status:
                raise  # the server then closes the connection, so that no client takes the response for complete
            log.exception("request %s failed", record.id)
            message = f"internal error ({type(error).__name__}). See request {record.id} in the ingress log"
            internal = HTTPError(500, message, "internal_error", "internal_error")
            await send_json(recorded, 500, record.shape.body(internal), record.shape.headers())
        finally:
            if record.path:
                self._metrics.ended(record)
                log.info("%s", record)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/":  # some clients look whether anybody is there
            check_method(method, path, "GET", "HEAD")
            await send_json(send, 200, {"name": "llmrun", "version": llmrun.__version__, "openapi": "/openapi.json"})
        elif path == "/health":
            headers = self._proof(scope)
            await send_json(send, 200, {"status": "ok", "version": llmrun.__version__}, headers)
        elif path == "/ready":
            await send_json(send, *self._readiness.report(time.monotonic()))
        elif path == "/openapi.json":
            await send_json(send, 200, openapi(USUAL_PATHS))
        elif path == MODELS or path.startswith(MODELS + "/"):
            check_method(method, path, "GET", "HEAD")
            await self._models(scope, path, send, record)
        elif path == "/metrics":
            check_method(method, path, "GET", "HEAD")
            self._check_metrics_access(scope)
            await send_bytes(send, 200, await self._metrics_page(), CONTENT_TYPE_LATEST)
        elif path.startswith(CONTROL_ROOT + "/"):
            await self._control(scope, receive, send)
        elif path not in USUAL_PATHS and path not in self._paths():
            await self._dispatch_canonical(scope, receive, send, record)
        else:
            check_method(method, path, "POST")
            record.path = path
            with self._counted():
                key = self._authenticate(scope, record)
                check_content_type(scope)
                await self._infer(scope, receive, send, key, record)

    async def _dispatch_canonical(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        """Dispatch the path that is meant by another spelling. Raises HTTPError (404) if it is none."""
        known = self._paths()
        path, deployment = canonical_path(scope["path"], known)
        if path == scope["path"]:
            raise path_not_found(path, known)
        record.shape.path = path
        await self._dispatch({**scope, "path": path, "deployment": deployment}, receive, send, record)

    def _paths(self) -> frozenset[str]:
        """The paths that the models serve, and those that they usually serve."""
        return USUAL_PATHS.union(*(model.paths for model in self._queue.table.models.values()))

    def _check_metrics_access(self, scope: Scope) -> None:
        """Raise HTTPError (401): metrics name all models, adapters and nodes.

        On this machine, without a token, they are for everybody: Prometheus sends no key by default.
        """
        if not (self._keys_only or self._metrics_token):
            check_browser(scope, self._hosts, self._origins)
            return
        given = bearer_token(scope)
        is_token = bool(given and self._metrics_token) and digest_of(given or "") == digest_of(self._metrics_token)
        if not (is_token or is_operator(self._queue.table, given, time.time())):
            message = "metrics require LLMRUN_METRICS_TOKEN, or an admin's key: send `Authorization: Bearer TOKEN`"
            raise HTTPError(401, message, "invalid_metrics_token", "authentication_error")

    async def _metrics_page(self) -> bytes:
        """Return the metrics, at most METRICS_KEPT_S old: all engines are asked for them, by one request at a time."""
        async with self._gathering:
            if time.monotonic() - self._gathered > METRICS_KEPT_S:
                self._page = await self._metrics.gather(self._http(), self._links)
                self._gathered = time.monotonic()
            return self._page

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.answering += 1
        try:
            yield
        finally:
            self.answering -= 1

    def _proof(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """Return the header that answers a client's challenge (`llmrun.identity`), if it sent one."""
        challenge = dict(scope["headers"]).get(CHALLENGE_HEADER.lower().encode(), b"").decode("latin-1")
        server, digest = scope.get("server"), self._queue.table.admin
        if not (challenge and server and digest) or len(challenge) > MAX_CHALLENGE:
            return []
        return [(PROOF_HEADER.lower().encode(), prove(digest, challenge, server[1]).encode())]

    def _authenticate(self, scope: Scope, record: RequestRecord) -> KeyInfo | None:
        check_headers(scope)
        key = authenticate(self._queue.table, scope, time.time(), required=self._keys_only)
        if key is None:
            check_browser(scope, self._hosts, self._origins)
        record.key, record.operator = (key.name, key.role == "admin") if key else ("", True)
        return key

    async def _models(self, scope: Scope, path: str, send: Send, record: RequestRecord) -> None:
        key, table = self._authenticate(scope, record), self._queue.table
        name = path.removeprefix(MODELS).strip("/")
        if not name:
            body = await list_models(table.models.values(), partial(can_access, key))
            await send_bytes(send, 200, body, "application/json")
        else:
            target = find_target(table, name, partial(can_access, key))
            await resolve_pin(target, self._resolver)  # a revision that does not exist is an error here, too
            await send_json(send, 200, describe(target.model, name))

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_headers(scope)
        check_admin_access(scope, self._admin_host)
        check_operator(self._queue.table, scope, time.time())
        host, port = self._queue.table.control
        try:
            work = forward(self._http(), scope, receive, send, f"http://{host}:{port}{scope['path']}")
            await (work if scope["method"] in METHODS_WITH_BODY else cancel_on_disconnect(work, receive))
        except UpstreamUnavailable as error:
            message = f"control is not reachable ({error}). It is being restarted; retry in a few seconds"
            message = self._readiness.control_cause or message
            raise HTTPError(503, message, "control_away", "service_unavailable", retry_after=2) from None

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = new_session()
        return self._session

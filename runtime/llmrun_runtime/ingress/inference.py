"""The flow of an inference request: read the body, admit, apply limits, queue, relay."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from starlette.requests import ClientDisconnect

from llmrun.settings import Settings
from llmrun.wire import KeyInfo
from llmrun_runtime.asgi import Receive, Scope, Send
from llmrun_runtime.ingress.admission.admit import Admission, admit
from llmrun_runtime.ingress.admission.auth import KEY_HEADERS
from llmrun_runtime.ingress.admission.body import read_body
from llmrun_runtime.ingress.admission.encodings import content_encoding, decode
from llmrun_runtime.ingress.admission.held_bytes import HeldBody, HeldBytes
from llmrun_runtime.ingress.admission.output_tokens import with_field
from llmrun_runtime.ingress.admission.rate_limits import Limiter, key_limits, model_limits
from llmrun_runtime.ingress.admission.request import (
    COMMENTS_HEADER,
    LARGE_BYTES,
    PRIORITY_HEADER,
    ParsedRequest,
    parse_request,
)
from llmrun_runtime.ingress.admission.revision import Resolver, resolve_pin
from llmrun_runtime.ingress.admission.target import Target, check_path
from llmrun_runtime.ingress.disconnect import cancel_on_disconnect
from llmrun_runtime.ingress.endpoints.metrics import IngressMetrics
from llmrun_runtime.ingress.engine_deaths import FORGET_S, EngineDeaths, request_digest
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.queue.caller_wait import CallerWait
from llmrun_runtime.ingress.queue.claim import Caller, Claim
from llmrun_runtime.ingress.queue.keepalive import KeepaliveStream, KeepaliveTiming
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.ingress.relay import Deadlines, UpstreamRequest, UpstreamUnavailable, forwarded_headers, relay
from llmrun_runtime.ingress.request_record import RequestRecord
from llmrun_runtime.link.client import Links
from llmrun_runtime.wire.headers import ADAPTER_HEADER, KEY_HEADER, PROBE_HEADER, TOKEN_HEADER

log = logging.getLogger("llmrun.ingress")
# Headers that are never forwarded from clients: their credentials, and those that the ingress sets or acts on.
PRIVATE = frozenset(
    {b"authorization", *KEY_HEADERS, b"x-request-id", b"content-length", b"content-encoding"}
    | {name.encode() for name in (TOKEN_HEADER, KEY_HEADER, PROBE_HEADER, ADAPTER_HEADER)}
    | {name.lower().encode() for name in (PRIORITY_HEADER, COMMENTS_HEADER)}
)


class Inference:
    """Answers inference requests with the engines' responses."""

    def __init__(
        self,
        settings: Settings,
        queue: RequestQueue,
        limiter: Limiter,
        metrics: IngressMetrics,
        resolver: Resolver,
        links: Links,
        keepalive: KeepaliveTiming,
    ) -> None:
        self._max_body_bytes = settings.max_body_bytes
        self._body_timeout = settings.body_timeout
        self._held = HeldBytes(settings.max_held_bytes)
        # One thread, so that only one large body is parsed at a time: the result takes several times its bytes.
        self._parser = ThreadPoolExecutor(1, "llmrun-parser")
        self._request_timeout = settings.request_timeout
        self._deadlines = Deadlines(settings.first_byte_timeout, settings.idle_stream_timeout)
        self._queue = queue
        self._limiter = limiter
        self._metrics = metrics
        self._resolver = resolver
        self._links = links
        self._keepalive = keepalive
        self._comments = settings.stream_comments
        self._deaths = EngineDeaths()

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, key: KeyInfo | None, record: RequestRecord
    ) -> None:
        """Answer a request whose key is authenticated. Raises HTTPError before the response starts."""
        limits = key_limits(key)
        try:
            await self._limiter.wait_for_place(limits)
            now = time.monotonic()
            # Before the body is read: a refused request costs, too, so it counts.
            with self._limiter.acquire(limits, now), self._held.body(record.key) as body:
                await self._read(scope, receive, body)
                admission = admit(self._queue.table, key, scope, await self._parse(scope, body))
                if admission.capped:
                    body.replace(with_field(body.content, *admission.capped))
                await self._answer(admission, scope, receive, send, body, record)
        except ClientDisconnect:
            return  # while it uploaded
        except HTTPError:
            record.rate_limit_headers = record.rate_limit_headers or self._limiter.headers(limits, time.monotonic())
            raise

    async def _read(self, scope: Scope, receive: Receive, body: HeldBody) -> None:
        """Read and decode the body. Raises ClientDisconnect or HTTPError, see `read_body` and `decode`."""
        encoding = content_encoding(scope)
        body.replace(await read_body(scope, receive, self._max_body_bytes, body.reserve, self._body_timeout))
        if encoding:
            loop = asyncio.get_running_loop()
            decoding = loop.run_in_executor(self._parser, decode, body.content, encoding, self._max_body_bytes)
            content = await decoding
            body.reserve(max(0, len(content) - len(body.content)))
            body.replace(content)

    async def _parse(self, scope: Scope, body: HeldBody) -> ParsedRequest:
        """Parse the body, and normalize it. Raises HTTPError (400)."""
        content_type = dict(scope["headers"]).get(b"content-type", b"")
        deployment = scope.get("deployment", "")
        if len(body.content) <= LARGE_BYTES:
            parsed = parse_request(body.content, content_type, deployment)
        else:
            loop = asyncio.get_running_loop()
            parsed = await loop.run_in_executor(self._parser, parse_request, body.content, content_type, deployment)
        if parsed.normalized:
            body.replace(parsed.normalized)
        return replace(parsed, normalized=b"")

    async def _answer(
        self,
        admission: Admission,
        scope: Scope,
        receive: Receive,
        send: Send,
        body: HeldBody,
        record: RequestRecord,
    ) -> None:
        model, adapter = admission.target.model.name, admission.target.adapter
        record.model, record.adapter = model, self._metrics.adapter(model, adapter)
        if self._deaths:  # a digest of every body would cost too much
            self._check_deaths(_digest(admission, scope, body), record)
        record.shape.model = admission.request.model
        stream = KeepaliveStream(send, record.shape.headers(), self._keepalive, record.shape)
        try:
            await self._limiter.wait_for_place(model_limits(admission.target.model))
            now = time.monotonic()
            with (
                self._limiter.acquire(model_limits(admission.target.model), now),
                self._limiter.reserve(admission.limits, now, admission.output_tokens),
            ):
                record.rate_limit_headers = self._limiter.headers(admission.limits, time.monotonic())
                work = self._queue_and_relay(admission, scope, body, stream, record)
                await cancel_on_disconnect(self._in_time(work), receive)
        except HTTPError as error:
            record.rate_limit_headers = self._limiter.headers(admission.limits, time.monotonic())
            if not stream.response_started:
                raise
            if not stream.is_event_stream:
                raise ConnectionAbortedError(error.message) from None
            await stream.fail(record.shown(error))

    async def _in_time(self, work: Coroutine[Any, Any, None]) -> None:
        """Raises HTTPError (504) after LLMRUN_REQUEST_TIMEOUT."""
        if not self._request_timeout:
            await work
            return
        try:
            async with asyncio.timeout(self._request_timeout):
                await work
        except TimeoutError:
            message = f"timed out after {self._request_timeout:g} s (LLMRUN_REQUEST_TIMEOUT)"
            raise HTTPError(504, message, "request_timeout", "service_unavailable") from None

    async def _queue_and_relay(
        self, admission: Admission, scope: Scope, body: HeldBody, stream: KeepaliveStream, record: RequestRecord
    ) -> None:
        """Wait for a replica and relay; use another replica if the request has not reached an engine."""
        target = await resolve_pin(admission.target, self._resolver)
        parsed = admission.request
        caller = Caller(record.key, admission.probe, parsed.prefix, target.pin, record.adapter, admission.priority)
        comments = self._comments if admission.comments is None else admission.comments
        commented = stream if admission.streams and comments else None
        wait = CallerWait(self._queue, target.name, admission.max_wait, commented, caller)
        request = UpstreamRequest(
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"],
            headers=_upstream_headers(scope, record, caller, target, len(body.content)),
            body=body,
            response_headers=[*record.shape.headers(), *record.rate_limit_headers],
            deadlines=self._deadlines,
        )
        failed: list[str] = []
        while True:
            claim = await wait.claim(failed)
            with self._queue.releasing(claim):
                try:
                    # The engine reports its paths only once it runs, so this can differ from the check at admission.
                    check_path(self._queue.table.models.get(claim.model), request.path)

                    def on_first_byte(is_answer: bool, claim: Claim = claim) -> None:
                        record.first_byte = time.monotonic()
                        record.streamed = is_answer and stream.is_event_stream
                        self._queue.on_first_byte(claim)
                        if self._deaths:
                            self._deaths.forget(_digest(admission, scope, body))
                        body.let_go()  # nothing retries it from now on

                    await relay(self._links, claim.replica, request, stream, on_first_byte)
                    return
                except UpstreamUnavailable as error:
                    log.warning("request %s: replica %s is unavailable: %s", record.id, claim.replica.id[:12], error)
                    failed.append(claim.replica.id)
                    if not error.reached:
                        self._queue.on_unreachable(claim)
                    # A replica that has left the routing table was shut down in order. The request of one that was
                    # not may be what ended its engine, so only the client may retry it.
                    if error.reached and self._is_routed(claim):
                        digest = _digest(admission, scope, body)
                        self._deaths.add(digest, claim.replica.id, time.monotonic())
                        self._check_deaths(digest, record)
                        message = f"the engine of {claim.model} died while it ran the request. See `llmrun logs`"
                        raise HTTPError(503, message, "replica_gone", "service_unavailable", retry_after=5) from None

    def _is_routed(self, claim: Claim) -> bool:
        """Whether the routing table still has the claim's replica."""
        model = self._queue.table.models.get(claim.model)
        return model is not None and claim.replica.id in {replica.id for replica in model.replicas}

    def _check_deaths(self, digest: bytes, record: RequestRecord) -> None:
        """Raises HTTPError (500) for a request that two engines did not survive. It must not reach a third one."""
        if self._deaths.blocks(digest, time.monotonic()):
            log.error("request %s is refused: two engines of %s died while they ran it", record.id, record.model)
            message = (
                f"two engines of {record.model} died while they ran this request, so it is refused for "
                f"{FORGET_S / 60:g} min. See request {record.id} in the ingress log, and `llmrun logs`"
            )
            raise HTTPError(500, message, "engine_failed", "internal_error")


def _digest(admission: Admission, scope: Scope, body: HeldBody) -> bytes:
    model = admission.target.model
    return request_digest(model.name, model.version, scope["path"], body.content)


def _upstream_headers(
    scope: Scope, record: RequestRecord, caller: Caller, target: Target, length: int
) -> list[tuple[str, str]]:
    """Return the client's headers with those that the shim reads."""
    headers = forwarded_headers(scope, PRIVATE)
    headers += [("content-length", str(length)), ("x-request-id", record.id), (KEY_HEADER, caller.key)]
    if caller.probe:
        headers.append((PROBE_HEADER, "1"))
    if target.adapter:
        headers.append((ADAPTER_HEADER, f"{target.adapter} {target.pin}"))
    return headers

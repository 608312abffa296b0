"""Fixtures: an ingress on a real port, with a routing table that the test sets, in front of fake engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict
from starlette.requests import Request

from llmrun.identity import digest_of
from llmrun.settings import Settings
from llmrun.wire import KeyInfo
from llmrun_runtime import asgi, http
from llmrun_runtime.asgi import Receive, Scope, Send
from llmrun_runtime.ingress.admission.rate_limits import Limiter
from llmrun_runtime.ingress.app import Ingress
from llmrun_runtime.ingress.cors import with_cors
from llmrun_runtime.ingress.drain import Drain
from llmrun_runtime.ingress.endpoints.metrics import IngressMetrics
from llmrun_runtime.ingress.queue.keepalive import DEFAULT_TIMING, KeepaliveTiming
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.ingress.readiness import Readiness
from llmrun_runtime.link.server import Server
from llmrun_runtime.wire.headers import DIED, GONE_HEADER, TOKEN_HEADER
from llmrun_runtime.wire.reports import AdapterRevision
from llmrun_runtime.wire.routing_table import ModelRoute, ReplicaRoute, Table, by_names

CHAT = "/v1/chat/completions"
POST_JSON = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
"""The start of a raw request."""
CHUNKS = [b"data: {}\n\n", b"data: \xff not json\n\n", b"data: [DONE]\n\n"]
VALID_CHUNKS = [b'data: {"id": "resp_1", "sequence_number": 4, "choices": []}\n\n', b"data: [DONE]\n\n"]


class Engine:
    """A fake engine: records requests, and misbehaves as their bodies ask."""

    def __init__(self) -> None:
        self.body: dict[str, Any] = {}
        """The last JSON body."""
        self.requests: list[Request] = []
        self.client_left = asyncio.Event()
        """A client has disconnected before the end of its response."""
        self.shutting_down = False
        """Its shim accepts no requests."""
        self.port = 0
        """The port for links."""
        self._links: list[Server] = []
        self._serving: list[asyncio.Task[None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Respond unless the client disconnects."""
        request = Request(scope, receive)
        await request.body()
        self.requests.append(request)
        response = asyncio.ensure_future(self.respond(request, send))
        disconnect = asyncio.ensure_future(receive())
        await asyncio.wait({response, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not response.done():
            self.client_left.set()
        for future in (response, disconnect):
            future.cancel()
        await asyncio.gather(response, disconnect, return_exceptions=True)

    async def respond(self, request: Request, send: Send) -> None:
        """Stream CHUNKS, or VALID_CHUNKS with `valid`, unless the body asks for a fault.

        Faults: `refuse`, `hang`, `stall`, `die_early`, `die_late`, `end`, `fail`.
        """
        if request.url.path == "/metrics":
            text = b'# TYPE vllm:tokens_total counter\nvllm:tokens_total{model_name="one"} 7.0\n'
            await asgi.send_bytes(send, 200, text, "text/plain")
            return
        if self.shutting_down:
            await asgi.send_json(send, 503, {}, [(GONE_HEADER.encode(), b"1")])
            return
        form = request.headers.get("content-type", "").startswith("multipart/form-data")
        self.body = body = {} if form else json.loads(await request.body() or b"{}")
        if body.get("refuse"):
            await asgi.send_json(send, 400, {"error": {"message": "no\nsuch"}})
            return
        if body.get("die_early"):
            self.die()
        if body.get("end"):
            await asgi.send_json(send, 503, {}, [(GONE_HEADER.encode(), DIED.encode())])
            return
        await asyncio.sleep(body.get("stall", 0))
        headers = [(b"content-type", b"text/event-stream"), (b"x-engine", b"yes")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in VALID_CHUNKS if body.get("valid") else CHUNKS:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if body.get("die_late"):
                await asyncio.sleep(0.05)  # until the chunk is sent
                self.die()
            if body.get("fail"):
                raise RuntimeError("the app failed")
            if body.get("hang"):
                await asyncio.sleep(60)
        await send({"type": "http.response.body", "body": b""})

    def die(self) -> None:
        """Close all connections of ingresses, as if the engine died."""
        for link in self._links:
            link.close()

    def _accept(self) -> Server:
        self._links.append(Server(self, {}, (TOKEN_HEADER.encode(), f"t{self.port}".encode())))
        return self._links[-1]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        """Serve during the block."""
        server = await asyncio.get_running_loop().create_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        yield self
        self.die()
        server.close()
        await server.wait_closed()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def serve_http(self) -> tuple[str, int]:
        """Serve HTTP too, as control does, until the end of `running`; return the address."""
        sock = http.bind("127.0.0.1", 0)
        self._serving.append(asyncio.create_task(http.serve(self, sock)))
        return "127.0.0.1", sock.getsockname()[1]


class Bench:
    """An ingress whose routing table the test sets.

    `revisions`: what control returns for `adapter@revision`, while `control` is set.
    """

    revisions: dict[str, AdapterRevision]
    control: asyncio.Event
    readiness: Readiness
    drain: Drain
    socket: socket.socket

    def __init__(self, queue: RequestQueue, limiter: Limiter, url: str, session: aiohttp.ClientSession) -> None:
        self.queue, self.limiter, self.url, self.session = queue, limiter, url, session

    @property
    def idle(self) -> bool:
        """Whether no request waits or is in flight."""
        return not any(each.waiting or each.in_flight for each in self.queue.traffic().values())

    def table(self, *models: ModelRoute, **fields: Any) -> None:
        """Publish these models."""
        by_name = {model.name: model for model in models}
        number = self.queue.table.number + 1
        self.queue.update(Table("e", number, by_name, by_names(by_name), **fields))

    async def post(self, body: Any = None, path: str = CHAT, **options: Any) -> tuple[int, Any, Any]:
        """Return the status, the headers, and the body, parsed if it is JSON."""
        if not isinstance(body, bytes | AsyncIterator):
            body = json.dumps({"model": "one"} if body is None else body).encode()
        data = BytesIO(body) if isinstance(body, bytes) else body
        headers = CIMultiDict(options.pop("headers", {}))
        headers.setdefault("content-type", "application/json")
        async with self.session.post(self.url + path, data=data, headers=headers, **options) as response:
            raw = await response.read()
            parsed = json.loads(raw) if response.content_type == "application/json" else raw
            return response.status, response.headers, parsed


@contextlib.asynccontextmanager
async def running_ingress(
    *,
    keys_only: bool = False,
    keepalive: KeepaliveTiming = DEFAULT_TIMING,
    metrics_timeout: float = 3,
    **settings: Any,
) -> AsyncIterator[Bench]:
    """Run an ingress with these settings."""
    parsed = Settings(**{"max_body_bytes": 2**20, "wake_timeout": 1.5} | settings)
    queue, limiter = RequestQueue(parsed.wake_timeout, lambda: None), Limiter()
    revisions: dict[str, AdapterRevision] = {}
    control = asyncio.Event()
    control.set()

    async def resolve(model: str, adapter: str) -> AdapterRevision:
        await control.wait()
        return revisions[adapter]

    metrics = IngressMetrics("ingress", queue, timeout=metrics_timeout)
    readiness = Readiness()
    ingress = Ingress(parsed, queue, limiter, metrics, resolve, readiness, keys_only=keys_only, keepalive=keepalive)
    app = with_cors(ingress, parsed.cors_origins) if parsed.cors_origins else ingress
    http_server = http.HTTPServer(app, keepalive_timeout=parsed.keepalive_timeout)
    sock = http.bind("127.0.0.1", 0)
    server = asyncio.create_task(http_server.serve([sock]))
    async with aiohttp.ClientSession() as session:
        bench = Bench(queue, limiter, f"http://127.0.0.1:{sock.getsockname()[1]}", session)
        bench.revisions, bench.control = revisions, control
        bench.readiness, bench.drain = readiness, Drain(queue, ingress, http_server, readiness)
        bench.socket = sock
        yield bench
    await ingress.close()
    await queue.close()
    server.cancel()
    await asyncio.gather(server, return_exceptions=True)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running_ingress() as bench:
        yield bench


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with Engine().running() as engine:
        yield engine


def keys(*routes: KeyInfo) -> dict[str, KeyInfo]:
    """Return keys for a routing table; the secret of each is its name."""
    return {digest_of(key.name): key for key in routes}


def bearer(key: str) -> dict[str, Any]:
    """Return request options with an API key."""
    return {"headers": {"authorization": f"Bearer {key}"}}


def route(*ports: int, **fields: Any) -> ModelRoute:
    """Return a model `one` with replicas at these ports."""
    defaults: dict[str, Any] = {
        "name": "one",
        "app": "app",
        "version": 1,
        "state": "hot",
        "created": 7,
        "names": ("one", "org/one"),
        "paths": frozenset({CHAT}),
        "max_ongoing": 2,
        "replicas": tuple(ReplicaRoute(f"r{port}", "127.0.0.1", port, f"t{port}") for port in ports),
    }
    return ModelRoute(**(defaults | fields))

"""An ingress on a real port with a table that a test writes, in front of a stand-in for engines: fixtures for tests."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import aiohttp
import pytest
from starlette.requests import Request

from llmrun.settings import Settings
from llmrun.wire import KeyInfo
from llmrun_runtime import asgi, http
from llmrun_runtime.asgi import Receive, Scope, Send
from llmrun_runtime.ingress.admission.rate_limits import Limiter
from llmrun_runtime.ingress.app import Ingress
from llmrun_runtime.ingress.cors import with_cors
from llmrun_runtime.ingress.endpoints.metrics import IngressMetrics
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.link.server import Server
from llmrun_runtime.wire.headers import GONE_HEADER
from llmrun_runtime.wire.reports import AdapterRevision
from llmrun_runtime.wire.routing_table import ModelRoute, ReplicaRoute, Table, by_names, digest_of

CHAT = "/v1/chat/completions"
PIECES = [b"data: {}\n\n", b"data: \xff not json\n\n", b"data: [DONE]\n\n"]


class Engine:
    """A stand-in: what it was asked, and how it misbehaves when the body says so."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.left = asyncio.Event()
        """Somebody has left before the end."""
        self.leaving = False
        """Its shim takes no more."""
        self.port = 0
        """Its link's."""
        self.http_port = 0
        self._links: list[Server] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer unless the caller leaves."""
        request = Request(scope, receive)
        await request.body()
        self.asked.append(request)
        answer = asyncio.ensure_future(self.answer(request, send))
        gone = asyncio.ensure_future(receive())
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self.left.set()
        for future in (answer, gone):
            future.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)

    async def answer(self, request: Request, send: Send) -> None:
        """Stream PIECES; `hang`, `stall`, `die_early`, `die_late` and `fail` misbehave."""
        if request.url.path == "/metrics":
            text = b'# TYPE vllm:tokens_total counter\nvllm:tokens_total{model_name="one"} 7.0\n'
            await asgi.answer_bytes(send, 200, text, "text/plain")
            return
        if self.leaving:
            await asgi.answer(send, 503, {}, [(GONE_HEADER.encode(), b"1")])
            return
        form = request.headers.get("content-type", "").startswith("multipart/form-data")
        body = {} if form else json.loads(await request.body() or b"{}")
        if body.get("refuse"):
            await asgi.answer(send, 400, {"error": {"message": "no\nsuch"}})
            return
        if body.get("die_early"):
            self.die()
        await asyncio.sleep(body.get("stall", 0))
        headers = [(b"content-type", b"text/event-stream"), (b"x-engine", b"yes")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in PIECES:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            if body.get("die_late"):
                await asyncio.sleep(0.05)  # the piece is out
                self.die()
            if body.get("fail"):
                raise RuntimeError("the app failed")
            if body.get("hang"):
                await asyncio.sleep(60)
        await send({"type": "http.response.body", "body": b""})

    def die(self) -> None:
        """End all connections of ingresses, as an engine's death does."""
        for link in self._links:
            link.close()

    def _accept(self) -> Server:
        self._links.append(Server(self, {}))
        return self._links[-1]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        """Listen."""
        server = await asyncio.get_running_loop().create_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        sock = http.bind("127.0.0.1", 0)
        self.http_port = sock.getsockname()[1]
        serving = asyncio.create_task(http.serve(self, sock))
        yield self
        self.die()
        server.close()
        await server.wait_closed()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


class Bench:
    """An ingress with a table that the test writes; `revisions`: what control would say of `adapter@revision`.

    It says that while `control` is set.
    """

    revisions: dict[str, AdapterRevision]
    control: asyncio.Event

    def __init__(self, waiting: RequestQueue, limiter: Limiter, url: str, session: aiohttp.ClientSession) -> None:
        self.waiting, self.limiter, self.url, self.session = waiting, limiter, url, session

    def table(self, *models: ModelRoute, **more: Any) -> None:
        """Publish these models."""
        found = {model.name: model for model in models}
        number = self.waiting.table.number + 1
        self.waiting.update(Table("e", number, found, by_names(found), **more))

    async def ask(self, body: Any = None, path: str = CHAT, **more: Any) -> tuple[int, Any, Any]:
        """Status, headers and the body, parsed if it is JSON."""
        data = body if isinstance(body, bytes) else json.dumps({"model": "one"} if body is None else body).encode()
        async with self.session.post(self.url + path, data=BytesIO(data), **more) as answer:
            raw = await answer.read()
            parsed = json.loads(raw) if answer.content_type == "application/json" else raw
            return answer.status, answer.headers, parsed


@contextlib.asynccontextmanager
async def an_ingress(*, keys_only: bool = False, **settings: Any) -> AsyncIterator[Bench]:
    """One with these settings."""
    parsed = Settings(**{"max_body_bytes": 2**20, "wake_timeout": 1.5} | settings)
    waiting, limiter = RequestQueue(parsed.wake_timeout, lambda: None), Limiter()
    revisions: dict[str, AdapterRevision] = {}
    control = asyncio.Event()
    control.set()

    async def revise(model: str, called: str) -> AdapterRevision:
        await control.wait()
        return revisions[called]

    ingress = Ingress(parsed, waiting, limiter, IngressMetrics("ingress", waiting), revise, keys_only=keys_only)
    sock = http.bind("127.0.0.1", 0)
    app = with_cors(ingress, parsed.cors_origins) if parsed.cors_origins else ingress
    server = asyncio.create_task(http.serve(app, sock))
    async with aiohttp.ClientSession() as session:
        bench = Bench(waiting, limiter, f"http://127.0.0.1:{sock.getsockname()[1]}", session)
        bench.revisions, bench.control = revisions, control
        yield bench
    await ingress.close()
    await waiting.close()
    server.cancel()
    await asyncio.gather(server, return_exceptions=True)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with an_ingress() as bench:
        yield bench


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    async with Engine().running() as engine:
        yield engine


def keys(*routes: KeyInfo) -> dict[str, KeyInfo]:
    """For a table: the key of each is its name."""
    return {digest_of(key.name): key for key in routes}


def bearer(key: str) -> dict[str, Any]:
    """What a client sends."""
    return {"headers": {"authorization": f"Bearer {key}"}}


def route(*ports: int, **more: Any) -> ModelRoute:
    """A model `one` with replicas at these ports."""
    facts: dict[str, Any] = {
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
    return ModelRoute(**(facts | more))

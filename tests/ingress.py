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
from aiohttp import web

from llmrun.settings import Settings
from llmrun_runtime import http
from llmrun_runtime.ingress.app import Ingress
from llmrun_runtime.ingress.cors import with_cors
from llmrun_runtime.ingress.limits import Limiter
from llmrun_runtime.ingress.waiting import Waiting
from llmrun_runtime.table import ModelRoute, ReplicaRoute, Table, by_names

CHAT = "/v1/chat/completions"
PIECES = [b"data: {}\n\n", b"data: \xff not json\n\n", b"data: [DONE]\n\n"]


class Engine:
    """A stand-in: what it was asked, and how it misbehaves when the body says so."""

    def __init__(self) -> None:
        self.asked: list[web.Request] = []
        self.cancelled = asyncio.Event()
        self.port = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Stream PIECES; `hang`, `stall`, `die_early` and `die_late` misbehave."""
        self.asked.append(request)
        if request.path == "/metrics":
            return web.Response(text='# TYPE vllm:tokens counter\nvllm:tokens_total{model_name="one"} 7.0\n')
        body = {} if request.content_type == "multipart/form-data" else await request.json()
        if body.get("refuse"):
            return web.json_response({"error": {"message": "no\nsuch"}}, status=400)
        if body.get("die_early"):
            assert request.transport
            request.transport.abort()
            await asyncio.sleep(60)
        await asyncio.sleep(body.get("stall", 0))
        answer = web.StreamResponse(headers={"content-type": "text/event-stream", "x-engine": "yes"})
        await answer.prepare(request)
        try:
            for piece in PIECES:
                await answer.write(piece)
                if body.get("die_late"):
                    assert request.transport
                    request.transport.abort()
                if body.get("hang"):
                    await asyncio.sleep(60)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled.set()
            raise
        return answer

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Engine]:
        """Listen."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        yield self
        await runner.cleanup()


class Bench:
    """An ingress with a table that the test writes."""

    def __init__(self, waiting: Waiting, limiter: Limiter, url: str, session: aiohttp.ClientSession) -> None:
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
    waiting, limiter = Waiting(parsed.wake_timeout, lambda: None), Limiter()
    ingress = Ingress(parsed, waiting, limiter, keys_only=keys_only)
    sock = http.bind("127.0.0.1", 0)
    app = with_cors(ingress, parsed.cors_origins) if parsed.cors_origins else ingress
    server = asyncio.create_task(http.serve(app, sock))
    async with aiohttp.ClientSession() as session:
        yield Bench(waiting, limiter, f"http://127.0.0.1:{sock.getsockname()[1]}", session)
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

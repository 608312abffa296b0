"""`python -m llmrun_runtime.engines.sidecar.server CONFIG COMMAND…`: any OpenAI-compatible server as an engine.

Starts the command on loopback, waits until it is healthy, and stands in front of it with the lease and the shim: for
engines whose process the shim cannot be in. `CONFIG` is the JSON of `SidecarConfig`; `{port}` in the command becomes its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmrun_runtime.asgi import error_body
from llmrun_runtime.engines.shim import lease, usage_meter
from llmrun_runtime.engines.shim.middleware import Shim
from llmrun_runtime.engines.sidecar.engine import PORT, SidecarConfig

HEALTH_POLL_S = 0.1
END_S = 8.0
CONNECT_TIMEOUT_S = 5
PR_SET_PDEATHSIG = 1
ENDS_WITH_DONE = ("/v1/chat/completions", "/v1/completions")
KINDS = {400: "invalid_request_error", 404: "invalid_request_error", 422: "invalid_request_error"}


class Sidecar:
    """An ASGI app (`app`) in front of the server at `url`."""

    def __init__(self, beside: SidecarConfig, url: str) -> None:
        self._beside = beside
        self._url = url
        self._session: aiohttp.ClientSession | None = None
        routes = [Route(path, self._ask, methods=["POST"]) for path in beside.paths]
        read = [Route(path, self._read, methods=["GET"]) for path in beside.reads]
        self.app = Starlette(routes=[*routes, *read], lifespan=self._lifespan)
        self.app.add_middleware(Shim)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as self._session:
            while not await self._healthy():  # the replica bounds the whole start
                await asyncio.sleep(HEALTH_POLL_S)
            if (there := await self._posts()) is not None:
                app.router.routes[:] = [r for r in app.router.routes if _is_read(r) or getattr(r, "path", "") in there]
            yield

    async def _healthy(self) -> bool:
        assert self._session
        try:
            async with self._session.get(self._url + self._beside.health) as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async def _posts(self) -> set[str] | None:
        """What it takes POST requests at; None if it does not say."""
        assert self._session
        try:
            async with self._session.get(self._url + "/openapi.json") as answer:
                paths = (await answer.json())["paths"]
                return {path for path, methods in paths.items() if "post" in methods}
        except (aiohttp.ClientError, ValueError, LookupError, TypeError):
            return None

    async def _read(self, request: Request) -> Response:
        assert self._session
        async with self._session.get(self._url + request.url.path) as answer:
            kind = answer.headers.get("content-type")
            return Response(await answer.read(), answer.status, media_type=kind)

    async def _ask(self, request: Request) -> Response:
        """Ask the server; it hears when the caller leaves."""
        assert self._session
        try:
            body, kind = await request.body(), request.headers.get("content-type", "")
        except ClientDisconnect:
            return Response(status_code=499)
        headers = {"content-type": kind} if kind else {}
        url = self._url + request.url.path
        work = asyncio.ensure_future(self._session.post(url, data=self._renamed(body, kind), headers=headers))
        gone = asyncio.ensure_future(_left(request))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            return Response(status_code=499)
        try:
            answer = work.result()
        except (aiohttp.ClientError, TimeoutError) as error:
            text = f"the engine does not answer ({type(error).__name__})"
            return JSONResponse(error_body(text, "service_unavailable", "replica_gone"), 503)
        kind = answer.headers.get("content-type", "")
        counts = usage_meter.current()
        if kind.startswith("text/event-stream"):
            ends = b"data: [DONE]" if request.url.path in ENDS_WITH_DONE else b""
            return StreamingResponse(self._events(answer, counts, ends), answer.status, media_type=kind)
        async with answer:
            data = await answer.read()
        if not kind.startswith("application/json"):
            if answer.status >= 400:
                return JSONResponse(_as_openai(data.decode(errors="replace"), answer.status), answer.status)
            return Response(data, answer.status, media_type=kind)
        return self._whole(data, answer.status, counts)

    def _renamed(self, body: bytes, kind: str) -> bytes:
        """The body with the server's own name of the model."""
        if "json" not in kind.lower():
            return body
        try:
            asked = json.loads(body)
        except ValueError:
            return body  # the server's to refuse
        return json.dumps(asked | {"model": self._beside.model}).encode() if isinstance(asked, dict) else body

    def _whole(self, data: bytes, status: int, counts: usage_meter.MeteredRequest | None) -> Response:
        try:
            said = json.loads(data)
        except ValueError:
            return Response(data, status, media_type="application/json")
        if status >= 400:
            return JSONResponse(_as_openai(said, status), status)
        if isinstance(said, dict):
            self._note(said, counts)
        return JSONResponse(said, status)

    async def _events(
        self, answer: aiohttp.ClientResponse, counts: usage_meter.MeteredRequest | None, ends: bytes
    ) -> AsyncIterator[bytes]:
        """The server's events, with the model's name as clients know it, and `ends` where OpenAI's API has it.

        What comes between them stays as it is.
        """
        pace = _Pace()
        try:
            async with answer:
                async for line in answer.content:
                    ends = b"" if line.startswith(ends) else ends
                    if not line.startswith(b"data: {"):
                        yield line
                        continue
                    try:
                        said = json.loads(line[6:])
                    except ValueError:
                        yield line
                        continue
                    pace.heard(said, self._note(said, counts))
                    yield b"data: " + json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            if ends:
                yield ends + b"\n\n"
        finally:
            pace.ended()

    def _note(self, said: dict[str, Any], counts: usage_meter.MeteredRequest | None) -> int:
        """Put the model's name right, and count what an answer (or `/v1/responses`'s event of one) says it used.

        The tokens of the answer, if it says that.
        """
        completion = 0
        for part in (said, said.get("response")):
            if not isinstance(part, dict):
                continue
            if "model" in part:
                part["model"] = self._beside.name
            if counts and isinstance(usage := part.get("usage"), dict):
                completion = _tokens(usage, "completion", "output")
                counts.note(prompt=_tokens(usage, "prompt", "input"), completion=completion)
        return completion


class _Pace:
    """How fast the tokens of a stream come. Of several answers at once the time between events is no token's."""

    def __init__(self) -> None:
        self._stream: usage_meter.Stream | None = usage_meter.Stream("")
        self._tokens = 0

    def heard(self, event: Mapping[str, Any], tokens: int) -> None:
        """An event has come; `tokens` are those of the whole answer, if it says so."""
        self._tokens = tokens or self._tokens
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict) or choice.get("index"):
                self._stream = None
                return
            delta = choice.get("delta")
            if self._stream and (choice.get("text") or (isinstance(delta, dict) and delta.get("content"))):
                self._stream.came(1)

    def ended(self) -> None:
        """Count it."""
        if self._stream:
            self._stream.ended(self._tokens)


def _tokens(usage: Mapping[str, Any], *kinds: str) -> int:
    found = (usage.get(f"{kind}_tokens") for kind in kinds)
    return next((number for number in found if isinstance(number, int)), 0)


def _as_openai(said: Any, status: int) -> dict[str, Any]:
    """An error in OpenAI's shape, whatever the server's own is."""
    if isinstance(said, dict) and isinstance(said.get("error"), dict):
        return said
    text = said.get("detail", said.get("error", said)) if isinstance(said, dict) else said
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return error_body(text, KINDS.get(status, "server_error"), "engine_error")


async def _left(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(HEALTH_POLL_S)


def _is_read(route: Any) -> bool:
    return "GET" in (route.methods or ())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _end_with_parent() -> None:
    """The kernel ends a process whose parent was killed. Linux alone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


async def _until_it_ends(server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        await asyncio.sleep(HEALTH_POLL_S)


async def _run(beside: SidecarConfig, server: subprocess.Popen[bytes], port: int) -> int:
    """Serve until SIGTERM or until the server ends; the exit code."""
    sidecar = Sidecar(beside, f"http://127.0.0.1:{port}")
    family = socket.AF_INET6 if ":" in beside.host else socket.AF_INET
    with socket.create_server((beside.host, 0), family=family) as sock:
        lease.tell(port=sock.getsockname()[1])
        config = uvicorn.Config(sidecar.app, http="httptools", ws="none", lifespan="on", access_log=False)
        serving = asyncio.ensure_future(uvicorn.Server(config).serve(sockets=[sock]))
        ending = asyncio.ensure_future(_until_it_ends(server))
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        for task in (serving, ending):
            task.cancel()
        await asyncio.gather(serving, ending, return_exceptions=True)
    return server.poll() or 0


def main() -> None:
    """Serve until SIGTERM, until the server ends, or until the replica is gone."""
    beside, command = SidecarConfig.from_json(sys.argv[1]), sys.argv[2:]
    port = _free_port()
    try:
        words = [word.replace(PORT, str(port)) for word in command]
        # Safe: this process has no other thread yet.
        server = subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)  # noqa: PLW1509
    except OSError as error:
        sys.exit(f"sidecar: error: {command[0]} cannot be started: {error.strerror}")
    lease.hold(whole_group=True)
    code = 1
    try:
        code = asyncio.run(_run(beside, server, port))
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END_S)
        server.kill()
        server.wait()
    sys.stdout.flush()
    os._exit(code if code >= 0 else 1)


if __name__ == "__main__":
    main()

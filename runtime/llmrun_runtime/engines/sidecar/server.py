"""`python -m llmrun_runtime.engines.sidecar.server CONFIG COMMAND…`: any OpenAI-compatible server as an engine.

Starts the command, waits until it is healthy, and forwards requests to it; it holds the lease and has the shim, for
servers whose process cannot. `CONFIG` is `SidecarConfig` as JSON; `{socket}` in the command is replaced by the path of
a Unix socket in a folder that no other account can enter, and `{port}` by a port of 127.0.0.1.
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
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmrun_runtime.asgi import error_body
from llmrun_runtime.engines.base import CORES_ENV
from llmrun_runtime.engines.process.cores import parse_cpus
from llmrun_runtime.engines.shim import lease, usage_meter
from llmrun_runtime.engines.shim.middleware import Shim
from llmrun_runtime.engines.sidecar.engine import PORT, SOCKET, SidecarConfig
from llmrun_runtime.engines.sidecar.requests import problem

HEALTH_POLL_S = 0.1
TERM_GRACE_S = 8.0
CONNECT_TIMEOUT_S = 5
PR_SET_PDEATHSIG = 1
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
ENDS_WITH_DONE = ("/v1/chat/completions", "/v1/completions")
ERROR_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 422: "invalid_request_error"}


class RequestRefused(Exception):
    """The server must not see this request. The text is for the caller."""


class Sidecar:
    """An ASGI app (`app`) in front of a server.

    The server is at the Unix socket, or at the port of 127.0.0.1, where `is_ours` says whether it is the one that
    listens: another account of the node could have taken the port first.
    """

    def __init__(
        self, config: SidecarConfig, socket: str = "", port: int = 0, is_ours: Callable[[], bool] = lambda: True
    ) -> None:
        self._config = config
        self._socket = socket
        self._url = f"http://127.0.0.1:{port}" if port else "http://server"
        self._is_ours = is_ours
        self._session: aiohttp.ClientSession | None = None
        post = [Route(path, self._forward, methods=["POST"]) for path in config.paths]
        get = [Route(path, self._forward_get, methods=["GET"]) for path in config.get_paths]
        self.app = Starlette(routes=[*post, *get], lifespan=self._lifespan)
        self.app.add_middleware(Shim)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
        # A server closes a connection after an exception of its own: a request that reuses it at that moment is lost.
        options: dict[str, Any] = {"limit": 0, "force_close": True}
        connector = aiohttp.UnixConnector(self._socket, **options) if self._socket else aiohttp.TCPConnector(**options)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            while not await self._healthy():  # the replica limits the time of the whole start
                await asyncio.sleep(HEALTH_POLL_S)
            if (paths := await self._server_paths()) is not None:
                app.router.routes[:] = [r for r in app.router.routes if _is_get(r) or getattr(r, "path", "") in paths]
            yield

    async def _healthy(self) -> bool:
        assert self._session
        try:
            async with self._session.get(self._url + self._config.health) as answer:
                return answer.status == 200 and await asyncio.to_thread(self._is_ours)
        except aiohttp.ClientError:
            return False

    async def _server_paths(self) -> set[str] | None:
        """Return the paths at which the server accepts POST; None if it has no OpenAPI document."""
        assert self._session
        try:
            async with self._session.get(self._url + "/openapi.json") as answer:
                paths = (await answer.json())["paths"]
                return {path for path, methods in paths.items() if "post" in methods}
        except (aiohttp.ClientError, ValueError, LookupError, TypeError):
            return None

    async def _forward_get(self, request: Request) -> Response:
        assert self._session
        async with self._session.get(self._url + request.url.path) as answer:
            content_type = answer.headers.get("content-type")
            return Response(await answer.read(), answer.status, media_type=content_type)

    async def _forward(self, request: Request) -> Response:
        """Forward a request; close the connection to the server when the client disconnects."""
        assert self._session
        try:
            body, content_type = await request.body(), request.headers.get("content-type", "")
        except ClientDisconnect:
            return Response(status_code=499)
        url = self._url + request.url.path
        try:
            if content_type.lower().startswith(FORMS):
                data: bytes | aiohttp.FormData = self._form_with_server_name(await request.form())
                headers = {}  # the new form has its own boundary
            else:
                data = self._with_server_name(body)
                headers = {"content-type": content_type} if content_type else {}
        except (RequestRefused, HTTPException) as error:
            text = error.detail if isinstance(error, HTTPException) else str(error)
            return JSONResponse(error_body(text, "invalid_request_error", "engine_error"), 400)
        call = asyncio.ensure_future(self._session.post(url, data=data, headers=headers))
        disconnected = asyncio.ensure_future(_until_disconnected(request))
        await asyncio.wait({call, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        disconnected.cancel()
        if not call.done():
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            return Response(status_code=499)
        try:
            answer = call.result()
        except (aiohttp.ClientError, TimeoutError) as error:
            text = f"the engine does not answer ({type(error).__name__})"
            return JSONResponse(error_body(text, "service_unavailable", "replica_gone"), 503)
        content_type = answer.headers.get("content-type", "")
        metered = usage_meter.current()
        if content_type.startswith("text/event-stream"):
            end = b"data: [DONE]" if request.url.path in ENDS_WITH_DONE else b""
            return StreamingResponse(self._events(answer, metered, end), answer.status, media_type=content_type)
        async with answer:
            data = await answer.read()
        if not content_type.startswith("application/json"):
            if answer.status >= 400:
                return JSONResponse(_as_openai(data.decode(errors="replace"), answer.status), answer.status)
            return Response(data, answer.status, media_type=content_type)
        return self._json_response(data, answer.status, metered)

    def _with_server_name(self, body: bytes) -> bytes:
        """Return the request body with the model's name for the server, whatever content type the client sent.

        Raises RequestRefused if the server must not see it.
        """
        try:
            payload = json.loads(body)
        except ValueError:
            return body  # a form, or the server rejects it
        if cause := problem(payload, self._config.media_hosts):
            raise RequestRefused(cause)
        return json.dumps(payload | {"model": self._config.model}).encode() if isinstance(payload, dict) else body

    def _form_with_server_name(self, form: FormData) -> aiohttp.FormData:
        """Return the form with the model's name for the server, which loads the model that a form names.

        Raises RequestRefused if a file is a text: the server could take it for a path.
        """
        renamed = aiohttp.FormData()
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                renamed.add_field(name, value.file, filename=value.filename, content_type=value.content_type)
            elif name == "file":
                raise RequestRefused("'file' has no file. Upload one")
            elif name != "model":
                renamed.add_field(name, value)
        renamed.add_field("model", self._config.model)
        return renamed

    def _json_response(self, data: bytes, status: int, metered: usage_meter.MeteredRequest | None) -> Response:
        try:
            payload = json.loads(data)
        except ValueError:
            return Response(data, status, media_type="application/json")
        if status >= 400:
            return JSONResponse(_as_openai(payload, status), status)
        if isinstance(payload, dict):
            self._process(payload, metered)
        return JSONResponse(payload, status)

    async def _events(
        self, answer: aiohttp.ClientResponse, metered: usage_meter.MeteredRequest | None, end: bytes
    ) -> AsyncIterator[bytes]:
        """Yield the server's events with the model's name for clients, and `end` if the server does not send it.

        Lines that are not JSON events are unchanged. Without usage from the server, each event counts as a token: a
        limit of tokens must not depend on what a server reports.
        """
        pace, outputs = _Pace(), 0
        try:
            async with answer:
                async for line in answer.content:
                    usage_meter.mark_output()
                    end = b"" if line.startswith(end) else end
                    if not line.startswith(b"data: {"):
                        yield line
                        continue
                    try:
                        event = json.loads(line[6:])
                    except ValueError:
                        yield line
                        continue
                    outputs += _has_output(event)
                    pace.add(event, self._process(event, metered))
                    yield b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
            if end:
                yield end + b"\n\n"
        finally:
            if metered and outputs and not pace.tokens:
                metered.record(completion=outputs)
            pace.finish()

    def _process(self, payload: dict[str, Any], metered: usage_meter.MeteredRequest | None) -> int:
        """Set the model's name for clients, and count the usage in an answer or an event.

        `/v1/responses` nests both under "response". Return the completion tokens; 0 without usage.
        """
        completion = 0
        for part in (payload, payload.get("response")):
            if not isinstance(part, dict):
                continue
            if "model" in part:
                part["model"] = self._config.name
            if metered and isinstance(usage := part.get("usage"), dict):
                completion = _tokens(usage, "completion", "output")
                metered.record(prompt=_tokens(usage, "prompt", "input"), completion=completion)
        return completion


class _Pace:
    """Measures the time per token of a stream. With several choices, events interleave, so nothing is measured."""

    def __init__(self) -> None:
        self._stream: usage_meter.Stream | None = usage_meter.Stream("")
        self.tokens = 0

    def add(self, event: Mapping[str, Any], tokens: int) -> None:
        """Add an event, received now; `tokens`: the total of the whole answer, if the event contains it."""
        self.tokens = tokens or self.tokens
        choices = event.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if not isinstance(choice, dict) or choice.get("index"):
                self._stream = None
                return
            delta = choice.get("delta")
            if self._stream and (choice.get("text") or (isinstance(delta, dict) and delta.get("content"))):
                self._stream.add(1)

    def finish(self) -> None:
        """Count the stream."""
        if self._stream:
            self._stream.finish(self.tokens)


def _has_output(event: Mapping[str, Any]) -> bool:
    """Return whether an event of any of OpenAI's streams has text, or calls a tool."""
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and (choice.get("text") or set(choice.get("delta") or ()) - {"role"}):
            return True
    return bool(event.get("delta"))  # /v1/responses


def _tokens(usage: Mapping[str, Any], *kinds: str) -> int:
    counts = (usage.get(f"{kind}_tokens") for kind in kinds)
    return next((count for count in counts if isinstance(count, int)), 0)


def _as_openai(payload: Any, status: int) -> dict[str, Any]:
    """Return a server's error in OpenAI's format."""
    if isinstance(payload, dict) and isinstance(payload.get("error"), dict):
        return payload
    text = payload.get("detail", payload.get("error", payload)) if isinstance(payload, dict) else payload
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return error_body(text, ERROR_TYPES.get(status, "server_error"), "engine_error")


async def _until_disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(HEALTH_POLL_S)


def _is_get(route: Any) -> bool:
    return "GET" in (route.methods or ())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _prepare_server() -> None:
    """Have the kernel kill this process when its parent exits, and run it on its cores. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if cores := os.environ.get(CORES_ENV):
        os.sched_setaffinity(0, parse_cpus(cores))


async def _until_exit(server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        await asyncio.sleep(HEALTH_POLL_S)


def listens(server: int, port: int) -> bool:
    """Return whether the process of this ID, or one that it started, listens on a port of 127.0.0.1."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(server)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                for found in member.net_connections("tcp"):
                    if found.status == psutil.CONN_LISTEN and found.laddr.port == port:
                        return True
    return False


async def _run(config: SidecarConfig, server: subprocess.Popen[bytes], socket_path: str, port: int) -> int:
    """Serve until SIGTERM or until the server exits; return the exit code."""
    sidecar = Sidecar(config, socket_path, port, lambda: bool(socket_path) or listens(server.pid, port))
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.create_server((config.host, 0), family=family) as sock:
        lease.notify(port=sock.getsockname()[1])
        http = uvicorn.Config(sidecar.app, http="httptools", ws="none", lifespan="on", access_log=False)
        serving = asyncio.ensure_future(uvicorn.Server(http).serve(sockets=[sock]))
        exited = asyncio.ensure_future(_until_exit(server))
        await asyncio.wait({serving, exited}, return_when=asyncio.FIRST_COMPLETED)
        for task in (serving, exited):
            task.cancel()
        await asyncio.gather(serving, exited, return_exceptions=True)
    return server.poll() or 0


def main() -> None:
    """Serve until SIGTERM, until the server exits, or until the replica does."""
    config, command = SidecarConfig.from_json(sys.argv[1]), sys.argv[2:]
    on_socket = SOCKET in command
    port = 0 if on_socket else _free_port()
    socket_path = str(Path(tempfile.gettempdir()) / "server") if on_socket else ""
    try:
        words = [word.replace(PORT, str(port)).replace(SOCKET, socket_path) for word in command]
        # Safe: this process has no other thread yet.
        server = subprocess.Popen(words, stdin=subprocess.DEVNULL, preexec_fn=_prepare_server)  # noqa: PLW1509
    except OSError as error:
        sys.exit(f"sidecar: error: failed to start {command[0]}: {error.strerror}")
    lease.hold(whole_group=True)
    code = 1
    try:
        code = asyncio.run(_run(config, server, socket_path, port))
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(TERM_GRACE_S)
        server.kill()
        server.wait()
    sys.stdout.flush()
    os._exit(code if code >= 0 else 1)


if __name__ == "__main__":
    main()

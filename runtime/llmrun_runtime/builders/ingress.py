"""OpenAI's API for the models of a Serve application. Requests and responses pass through Serve's handles."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llmrun.errors import EngineError
from llmrun.settings import Settings
from llmrun_runtime.ingress.admission.body import read_body
from llmrun_runtime.ingress.admission.encodings import content_encoding, decode
from llmrun_runtime.ingress.admission.request import check_method, parse_request
from llmrun_runtime.ingress.admission.target import model_not_found
from llmrun_runtime.ingress.endpoints.models import MODELS, entry
from llmrun_runtime.ingress.engine_errors import engine_error
from llmrun_runtime.ingress.error_shapes import ErrorShape
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.queue.keepalive import STREAM_HEADERS
from llmrun_runtime.ingress.relay import EVENT_STREAM, interrupted


class OpenAIIngress:
    """The ingress deployment.

    `names`: each name or alias that clients may use → the model's name. `models`: the models' handles by the model's
    name, with `_` for `-`.
    """

    def __init__(self, names: Mapping[str, str], **models: Any) -> None:
        self._names = dict(names)
        self._models = {name.replace("_", "-"): handle.options(stream=True) for name, handle in models.items()}
        self._started = int(time.time())
        self._max_body = Settings().max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer one request. Errors have the shape of the path's API."""
        try:
            return await self._answer(request)
        except HTTPError as error:
            headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
            return JSONResponse(_shape(request).body(error), error.status, headers)

    async def _answer(self, request: Request) -> Response:
        path, method = request.url.path.removeprefix(request.scope.get("root_path", "")) or "/", request.method
        if path == "/health":
            return JSONResponse({"status": "ok"})
        if path == MODELS or path.startswith(MODELS + "/"):
            check_method(method, path, "GET", "HEAD")
            return JSONResponse(self._list(path.removeprefix(MODELS).lstrip("/")))
        if not path.startswith("/v1/") and method != "POST":
            raise HTTPError(404, f"path {path} not found", "path_not_found")
        check_method(method, path, "POST")
        body = await read_body(request.scope, request.receive, self._max_body)
        if encoding := content_encoding(request.scope):
            body = await asyncio.to_thread(decode, body, encoding, self._max_body)
        content_type = request.headers.get("content-type", "application/json")
        parsed = parse_request(body, content_type.encode())
        name, shape = self._model_name(parsed.model), _shape(request, parsed.model)
        with _http_errors(name):
            response: AsyncIterator[Any] = self._models[name].ask.remote(path, parsed.normalized or body, content_type)
            head = await anext(aiter(response))
            status, media_type = head["status"], head["content_type"]
            if status >= 400:
                raise engine_error(status, (), b"".join([chunk async for chunk in response]), path)
            if media_type.encode().startswith(EVENT_STREAM):
                headers = {key.decode(): value.decode() for key, value in STREAM_HEADERS}
                return StreamingResponse(_events(name, response, shape), status, headers, media_type=media_type)
            return Response(b"".join([chunk async for chunk in response]), status, media_type=media_type)

    def _model_name(self, name: str) -> str:
        """The model's own name, for its name or an alias. Raises HTTPError."""
        if name not in self._names:
            raise model_not_found(name, self._names)
        return self._names[name]

    def _list(self, name: str) -> dict[str, Any]:
        """One model by its name or an alias, or all models for "". Raises HTTPError."""
        if name:
            self._model_name(name)
            return entry(name, self._started)
        return {"object": "list", "data": [self._list(model) for model in self._models]}


@contextlib.contextmanager
def _http_errors(model: str) -> Iterator[None]:
    """Convert errors of a call to the model's replica to HTTPError."""
    try:
        yield
    except serve.exceptions.BackPressureError as error:
        raise HTTPError(429, str(error), "queue_full", "rate_limit_error", retry_after=1) from None
    except serve.exceptions.DeploymentUnavailableError as error:
        raise HTTPError(503, str(error), "model_failed", "service_unavailable", retry_after=5) from None
    except RayTaskError as error:
        if not isinstance(error.cause, EngineError):
            raise HTTPError(500, f"{model} failed: {error.cause}", "internal_error", "internal_error") from error
        raise HTTPError(503, str(error.cause), "replica_gone", "service_unavailable", retry_after=5) from None
    except RayError as error:  # its process or its node died
        message = f"a replica of {model} died ({type(error).__name__}): retry the request"
        raise HTTPError(503, message, "replica_gone", "service_unavailable", retry_after=5) from None


def _shape(request: Request, model: str = "") -> ErrorShape:
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    return ErrorShape(path, request.headers.get("x-request-id") or uuid.uuid4().hex, model)


async def _events(model: str, response: AsyncIterator[bytes], shape: ErrorShape) -> AsyncIterator[bytes]:
    """Relay the chunks of an event stream; end it with an error event if the replica dies."""
    first = last = b""
    try:
        with _http_errors(model):
            async for last in response:
                first = first or last
                yield last
    except HTTPError as error:
        yield shape.event(interrupted(error.message), first, last)

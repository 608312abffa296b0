"""OpenAI's API in front of models of the same Serve application. Bytes go through Serve's handles here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llmrun.errors import EngineError
from llmrun.settings import Settings
from llmrun_runtime.ingress.admission.admit import no_model
from llmrun_runtime.ingress.admission.request import check_method, read_request
from llmrun_runtime.ingress.endpoints.models import MODELS, entry
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.relay import EVENTS, broken_off, read_body


class OpenAIIngress:
    """`names`: for each name that clients may ask for, its own or an alias, the model's own name; `models`: handles by
    that (`_` for `-`)."""

    def __init__(self, names: Mapping[str, str], **models: Any) -> None:
        self._names = dict(names)
        self._models = {name.replace("_", "-"): handle.options(stream=True) for name, handle in models.items()}
        self._started = int(time.time())
        self._max_body = Settings().max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer one request. Its errors have OpenAI's shape."""
        try:
            return await self._answer(request)
        except HTTPError as refusal:
            headers = {"retry-after": str(refusal.retry_after)} if refusal.retry_after is not None else {}
            return JSONResponse(refusal.body(), refusal.status, headers)

    async def _answer(self, request: Request) -> Response:
        path, method = request.url.path.removeprefix(request.scope.get("root_path", "")) or "/", request.method
        if path == "/health":
            return JSONResponse({"status": "ok"})
        if path == MODELS or path.startswith(MODELS + "/"):
            check_method(method, path, "GET", "HEAD")
            return JSONResponse(self._list(path.removeprefix(MODELS).lstrip("/")))
        if not path.startswith("/v1/") and method != "POST":
            raise HTTPError(404, f"there is no {path} here", "path_not_found")
        check_method(method, path, "POST")
        body = await read_body(request.scope, request.receive, self._max_body)
        content_type = request.headers.get("content-type", "application/json")
        asked = read_request(body, content_type.encode())
        name = self._model(asked.model)
        with _refused(name):
            answer: AsyncIterator[Any] = self._models[name].ask.remote(path, asked.mended or body, content_type)
            head = await anext(aiter(answer))
            status, kind = head["status"], head["content_type"]
            if kind.encode().startswith(EVENTS):
                return StreamingResponse(_events(name, answer), status, media_type=kind)
            return Response(b"".join([piece async for piece in answer]), status, media_type=kind)

    def _model(self, name: str) -> str:
        """The model that is called so. Raises Refusal."""
        if name not in self._names:
            raise no_model(name, self._names)
        return self._names[name]

    def _list(self, name: str) -> dict[str, Any]:
        """One model, by any of its names, or all. Raises Refusal."""
        if name:
            self._model(name)
            return entry(name, self._started)
        return {"object": "list", "data": [self._list(each) for each in self._models]}


@contextlib.contextmanager
def _refused(model: str) -> Iterator[None]:
    """What goes wrong between here and the model's replica, as an answer to the client: a Refusal."""
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
    except RayError as error:  # its process, or its node, is gone
        text = f"the replica of {model} went away ({type(error).__name__}): ask again"
        raise HTTPError(503, text, "replica_gone", "service_unavailable", retry_after=5) from None


async def _events(model: str, answer: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of a stream of events; it ends with an error event if the model goes away."""
    last = b""
    try:
        with _refused(model):
            async for last in answer:
                yield last
    except HTTPError as refusal:
        yield broken_off(last, f"went away: {refusal.text}")

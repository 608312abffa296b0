"""OpenAI's API in front of models of the same Serve application. Bytes go through Serve's handles here."""

from __future__ import annotations

import difflib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llmrun.errors import EngineError
from llmrun_runtime.asgi import error_body

MODELS = "/v1/models"


class OpenAIIngress:
    """`names`: for each name that clients may ask for, the model that is meant; `models`: a handle to each model."""

    def __init__(self, names: Mapping[str, str], **models: Any) -> None:
        self._names = dict(names)
        self._models = {name.replace("_", "-"): handle for name, handle in models.items()}
        self._paths: dict[str, list[str]] = {}

    async def __call__(self, request: Request) -> Response:
        """Answer one request. Its errors have OpenAI's shape."""
        path = request.url.path[len(request.scope.get("root_path", "")) :] or "/"
        if request.method == "GET" and (path == MODELS or path.startswith(MODELS + "/")):
            return self._list(path.removeprefix(MODELS).lstrip("/"))
        if request.method == "GET" and path == "/health":
            return JSONResponse({"status": "ok"})
        if request.method != "POST":
            return _refused(405 if path.startswith("/v1/") else 404, f"there is no {request.method} {path} here")
        body = await request.body()
        try:
            asked = json.loads(body)
            model = asked["model"]
        except (ValueError, LookupError, TypeError):
            text = "the body is no JSON object with a `model` (forms need llmrun's own ingress: `llmrun deploy`)"
            return _refused(400, text)
        name = self._names.get(model) if isinstance(model, str) else None
        if not name:
            return self._unknown(model)
        try:
            if path not in await self._paths_of(name):
                return _refused(404, f"{name} has no {path}: it has {', '.join(self._paths[name])}")
            content_type = request.headers.get("content-type", "application/json")
            handle = self._models[name].options(stream=True)
            answer: AsyncIterator[Any] = handle.ask.remote(path, body, content_type).__aiter__()
            head = await anext(answer)
            status, kind = head["status"], head["content_type"]
            if kind.startswith("text/event-stream"):
                return StreamingResponse(answer, status, media_type=kind)
            return Response(b"".join([piece async for piece in answer]), status, media_type=kind)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            return _refused(503, str(cause) if isinstance(cause, EngineError) else f"{name} failed: {cause}")
        except (serve.exceptions.BackPressureError, serve.exceptions.DeploymentUnavailableError) as error:
            return _refused(429 if isinstance(error, serve.exceptions.BackPressureError) else 503, str(error))

    async def _paths_of(self, name: str) -> list[str]:
        """The inference paths of a model; it is woken to say them, once."""
        if name not in self._paths:
            self._paths[name] = await self._models[name].paths.remote()
        return self._paths[name]

    def _list(self, name: str) -> Response:
        if name and name not in self._names:
            return self._unknown(name)
        data = [{"id": each, "object": "model", "created": 0, "owned_by": "llmrun"} for each in self._models]
        if name:
            return JSONResponse(data[list(self._models).index(self._names[name])] | {"id": name})
        return JSONResponse({"object": "list", "data": data})

    def _unknown(self, name: Any) -> Response:
        near = difflib.get_close_matches(str(name), list(self._names), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(self._names))}"
        return _refused(404, f"the model {name!r} does not exist: {hint}", "model_not_found")


def _refused(status: int, text: str, code: str = "") -> Response:
    kind = "invalid_request_error" if status < 429 else "service_unavailable"
    return JSONResponse(error_body(text, kind, code or kind), status)

"""Control's HTTP API under `/llmrun/v1`, reached through the ingress; always with the admin key, for it runs code."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError

import llmrun
from llmrun.errors import LLMRunError, Refused
from llmrun.spec import ModelSpec
from llmrun.wire import (
    CONTROL_ROOT,
    MAX_PACKAGE_BYTES,
    AdapterRow,
    ColdStart,
    DeployRequest,
    KeyInfo,
    NewKey,
    Plan,
    Status,
    UsageLine,
    WeightsRequest,
    WeightsRow,
)
from llmrun_runtime.asgi import App, Receive, Scope, Send, answer_error
from llmrun_runtime.control.control_plane import ControlPlane

FOLLOW_S = 0.5
METRICS = "/metrics"  # for Prometheus, which has no key
BY = r"^(day|key|model|adapter)(,(day|key|model|adapter))*$"
DAY = r"^\d{4}-\d\d-\d\d$"


class AdminKey:
    """ASGI middleware: 401 without the admin key."""

    def __init__(self, app: App, key: str) -> None:
        self._app = app
        self._key = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != METRICS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):
                text = (
                    "wrong admin key: " if given else "no admin key: "
                ) + "set LLMRUN_ADMIN_KEY to the one in `admin.key` of the head's LLMRUN_HOME"
                await answer_error(send, 401, text, "authentication_error", "invalid_admin_key")
                return
        await self._app(scope, receive, send)


def make_api(parts: ControlPlane) -> App:
    """The API over control's parts."""
    api = FastAPI(title="llmrun control", version=llmrun.__version__, docs_url=None, redoc_url=None)
    root = CONTROL_ROOT

    @api.exception_handler(LLMRunError)
    async def refused(_: Request, error: LLMRunError) -> JSONResponse:
        status = error.status if isinstance(error, Refused) else 409
        return JSONResponse({"error": {"message": str(error)}}, status)

    @api.exception_handler(SQLAlchemyError)
    async def database_failed(_: Request, error: SQLAlchemyError) -> JSONResponse:
        text = f"control's database failed: {str(error).splitlines()[0]}: see LLMRUN_DATABASE_URL"
        return JSONResponse({"error": {"message": text}}, 503)

    @api.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        text = f"control failed ({type(error).__name__}: {error}); logs/control.log in the head's home has more"
        return JSONResponse({"error": {"message": text}}, 500)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        text = f"{where}: {first['msg']}: is this llmrun as old as the cluster's ({llmrun.__version__})?"
        return JSONResponse({"error": {"message": text}}, 422)

    @api.get(f"{root}/status")
    async def status() -> Status:
        return Status(url=parts.url, models=parts.scaling.statuses())

    @api.get(f"{root}/specs")
    async def specs() -> list[ModelSpec]:
        return [row.spec for _, row in sorted(parts.scaling.deployed.items())]

    @api.post(f"{root}/plan")
    async def plan(request: DeployRequest) -> Plan:
        return (await parts.deployer.plan(request))[0]

    @api.post(f"{root}/deploys")
    async def deploy(request: DeployRequest) -> dict[str, str]:
        return {"id": (await parts.deployer.start(request)).id}

    @api.get(f"{root}/weights")
    async def weights() -> list[WeightsRow]:
        return await parts.stock.rows()

    @api.post(f"{root}/weights")
    async def work_on_weights(request: WeightsRequest) -> dict[str, str]:
        return {"id": parts.errands.start(request).id}

    @api.get(f"{root}/jobs/{{job_id}}/events")
    async def events(job_id: str) -> StreamingResponse:
        found = parts.jobs.find(job_id)
        return _lines(event.model_dump() async for event in found.events())

    @api.head(f"{root}/packages/{{digest}}")
    async def has_package(digest: str) -> Response:
        return Response(status_code=200 if parts.database.has_package(digest) else 404)

    @api.put(f"{root}/packages/{{digest}}")
    async def put_package(digest: str, request: Request) -> Response:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_PACKAGE_BYTES:
                raise Refused(f"the code package is larger than {MAX_PACKAGE_BYTES >> 20} MiB", 413)
        if hashlib.sha256(data).hexdigest() != digest:
            raise Refused("the code package arrived damaged: deploy again", 400)
        await asyncio.to_thread(parts.database.put_package, digest, bytes(data))
        return Response(status_code=204)

    @api.post(f"{root}/warm/{{name:path}}")
    async def warm(name: str) -> dict[str, str]:
        return {"model": _steer(parts, name, parts.scaling.warm)}

    @api.post(f"{root}/unload/{{name:path}}")
    async def unload(name: str) -> dict[str, str]:
        return {"model": _steer(parts, name, parts.scaling.unload)}

    @api.delete(f"{root}/models/{{name:path}}")
    async def delete_model(name: str) -> dict[str, list[str]]:
        model = _known(parts, name)
        await parts.deployer.delete([model])
        return {"deleted": [model]}

    @api.delete(f"{root}/apps/{{app}}")
    async def delete_app(app: str) -> dict[str, list[str]]:
        models = [row.name for row in parts.scaling.deployed.values() if row.app == app]
        if not models:
            apps = sorted({row.app for row in parts.scaling.deployed.values()})
            raise Refused(f"there is no app {app!r}; there are: {', '.join(apps) or 'none'}", 404)
        await parts.deployer.delete(models)
        return {"deleted": models}

    @api.get(f"{root}/starts/{{name:path}}")
    async def starts(name: str) -> list[ColdStart]:
        return parts.starts.of(_known(parts, name))

    @api.get(f"{root}/adapters/{{name:path}}")
    async def adapters(name: str) -> list[AdapterRow]:
        return parts.adapters.rows(_known(parts, name), parts.registry)

    @api.put(f"{root}/adapters/{{name:path}}")
    async def push_adapter(name: str, request: Request) -> dict[str, str]:
        base, _, adapter = name.partition(":")
        tar = request.stream()
        try:
            return {"id": (await parts.pushes.start(_known(parts, base), adapter, tar)).id}
        except Refused:
            async for _ in tar:  # who still sends would take an answer for a broken connection
                pass
            raise

    @api.get(f"{root}/keys")
    async def keys() -> list[KeyInfo]:
        return parts.keys.rows()

    @api.post(f"{root}/keys")
    async def create_key(facts: KeyInfo) -> NewKey:
        known = {name: row.name for row in parts.scaling.deployed.values() for name in row.spec.served_names}
        for name in facts.models:
            base, _, adapter = name.partition(":")
            if name in known or (adapter and base in known and parts.adapters.has(known[base], adapter)):
                continue
            if adapter and base in known:
                text = f"{base} has no such adapter: see `llmrun adapter list {base}`"
                raise Refused(f"--model {name}: {text}", 404)
            there = ", ".join(sorted(known)) or "none"
            raise Refused(f"--model {name}: there is no such model; there are: {there}", 404)
        return parts.keys.create(facts)

    @api.delete(f"{root}/keys/{{name}}")
    async def revoke_key(name: str) -> dict[str, str]:
        parts.keys.revoke(name)
        return {"revoked": name}

    @api.get(f"{root}/usage")
    async def usage(
        by: Annotated[str, Query(pattern=BY)] = "key,model", since: Annotated[str, Query(pattern=DAY)] = "0000-00-00"
    ) -> list[UsageLine]:
        await parts.usage.flush()
        return parts.usage.lines(by.split(","), since)

    @api.get(METRICS)
    async def metrics() -> Response:
        return Response(await parts.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @api.get(f"{root}/logs/{{name:path}}")
    async def logs(name: str, tail: Annotated[int, Query(ge=0)] = 200, follow: bool = False) -> StreamingResponse:
        return _lines(_log_lines(parts.read_logs, _known(parts, name), tail, follow))

    return AdminKey(api, parts.admin_key)


def _known(parts: ControlPlane, name: str) -> str:
    """The model that goes by that name or alias. Raises Refused."""
    rows = [*parts.scaling.deployed.values(), *(c.row for c in parts.scaling.candidates.values())]
    for row in rows:
        if name in row.spec.served_names:
            return row.name
    names = ", ".join(sorted({row.name for row in rows})) or "none"
    raise Refused(f"there is no model {name!r}; there are: {names}", 404)


def _steer(parts: ControlPlane, name: str, how: Callable[[str], None]) -> str:
    """Do it to the model in force that goes by that name. Raises Refused."""
    model = _known(parts, name)
    if model not in parts.scaling.deployed:
        raise Refused(f"{model}: no version of it is in force", 409)
    if model in parts.scaling.held:
        raise Refused(f"{model}: a deploy is at it: try again when it has ended", 409)
    how(model)
    return model


ReadLogs = Callable[[str, dict[str, dict[str, int]], int], Awaitable[dict[str, dict[str, tuple[int, str]]]]]


async def _log_lines(read: ReadLogs, model: str, tail: int, follow: bool) -> AsyncIterator[dict[str, Any]]:
    """New text of the model's logs on every node, file by file; without `follow` once."""
    offsets: dict[str, dict[str, int]] = {}
    while True:
        for node, files in (await read(model, offsets, tail)).items():
            for name, (offset, text) in files.items():
                offsets.setdefault(node, {})[name] = offset
                if text:
                    yield {"source": name.removesuffix(".log"), "text": text}
        if not follow:
            return
        tail = 2**20  # a file that appears while we follow is new: all of it
        await asyncio.sleep(FOLLOW_S)


def _lines(items: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """A stream of JSON objects, one a line."""

    async def encoded() -> AsyncIterator[bytes]:
        async for item in items:
            yield json.dumps(item).encode() + b"\n"

    return StreamingResponse(encoded(), media_type="application/x-ndjson")

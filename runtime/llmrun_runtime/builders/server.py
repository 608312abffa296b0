"""The Serve deployment of a model without control: it owns one engine and is called through Serve's handles."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray

from llmrun.errors import EngineError, RequestError
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun_runtime.engines.base import Launch, Member
from llmrun_runtime.engines.process.engine_process import EngineProcess
from llmrun_runtime.engines.process.temp_dir import sweep_temp_dirs
from llmrun_runtime.engines.registry import get_engine
from llmrun_runtime.ingress.admission.target import path_not_supported
from llmrun_runtime.link.client import LinkClient, LinkLostError, Links
from llmrun_runtime.logs import log_path
from llmrun_runtime.node.environments import Environments
from llmrun_runtime.node.launch import local_weights, make_launch
from llmrun_runtime.node.variables import worker_env
from llmrun_runtime.replica.drain import LINGER_S, wait_until_drained
from llmrun_runtime.weights.node_weights import NodeWeights
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.headers import TOKEN_HEADER
from llmrun_runtime.wire.replica_config import ReplicaConfig

VERSION = 0
"""Without control there are no versions; this number names the engine's log and cache."""


class LLMServer:
    """One replica of a model.

    `spec`: the model's fields as JSON. `app_file`: the file of its class, if the class has hooks. Its request methods
    return async iterators; call them through `handle.options(stream=True)`.
    """

    async def __init__(self, spec: dict[str, Any], app_file: str = "") -> None:  # type: ignore[misc]  # Serve awaits it
        """Return when the engine is ready. Raises LLMRunError; Serve then retries and reports it."""
        self._settings = Settings()
        self._settings.make_home()
        await asyncio.to_thread(sweep_temp_dirs)  # temporary files of a killed cluster
        self._spec = ModelSpec.model_validate(spec)
        self._app_file = app_file
        self._links = Links(self._settings.connect_timeout)
        self._engine = EngineProcess(get_engine(self._spec.engine), await self._launch())
        try:
            await self._engine.start()
            await self._engine.ready(self._settings.start_timeout)
            paths = (await self._engine.state())["paths"]
        except BaseException:
            await self._engine.end()
            raise
        supported = get_engine(self._spec.engine).paths
        self._paths = supported.intersection(paths) or supported  # some servers report no paths

    async def ask(self, path: str, body: bytes, content_type: str = "application/json") -> AsyncIterator[Any]:
        """Call one of the engine's inference paths: yield `{"status", "content_type"}`, then the body in chunks.

        `.cancel()` on the call stops the engine's work. Raises EngineError if the engine dies.
        """
        if path not in self._paths:
            error = path_not_supported(self._spec.name, path, self._paths)
            yield {"status": error.status, "content_type": "application/json"}
            yield json.dumps(error.body()).encode()
            return
        headers = [(TOKEN_HEADER, self._engine.token), ("content-type", content_type)]
        headers.append(("content-length", str(len(body))))
        try:
            link: LinkClient = await self._links.get(self._host, self._engine.link)
            with link.request("POST", path, b"", headers) as exchange:
                await exchange.send_body(body)
                await exchange.wait_headers()
                media_type = dict((key.lower(), value) for key, value in exchange.headers).get(b"content-type", b"")
                yield {"status": exchange.status, "content_type": media_type.decode("latin-1")}
                while chunk := await exchange.read():
                    yield chunk
        except (LinkLostError, OSError, TimeoutError) as error:
            raise EngineError(f"the engine of {self._spec.name} failed: {error or type(error).__name__}") from None

    async def chat(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Call `/v1/chat/completions`: yield one response, or each event of a stream (`"stream": True`).

        Raises RequestError with the model's status and body if it rejects the request, EngineError if the engine dies.
        """
        async for item in self._items("/v1/chat/completions", request):
            yield item

    async def completions(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Call `/v1/completions`; see `chat`."""
        async for item in self._items("/v1/completions", request):
            yield item

    async def embeddings(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Call `/v1/embeddings`; see `chat`."""
        async for item in self._items("/v1/embeddings", request):
            yield item

    async def check_health(self) -> None:
        """Raise EngineError if the engine has died: Serve then replaces this replica."""
        if self._engine.ended():
            raise EngineError(f"the engine died: {self._engine.cause()}")

    async def __del__(self) -> None:
        """Wait until nothing is in flight, then stop the engine."""

        async def in_flight(leave: bool) -> int | None:
            if self._engine.ended():
                return 0
            try:
                state = await (self._engine.leave() if leave else self._engine.state())
            except EngineError:
                return None
            return int(state["in_flight"])

        self._links.close()
        await wait_until_drained(in_flight, self._settings.drain_timeout - LINGER_S, linger=0)
        await self._engine.end()

    async def _items(self, path: str, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        body = json.dumps({"model": self._spec.name, **request}).encode()
        response = self.ask(path, body)
        head = await anext(response)
        if head["content_type"].startswith("text/event-stream"):
            rest = b""
            async for chunk in response:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        yield self._checked(json.loads(line.removeprefix(b"data: ")), head["status"])
            return
        content = b"".join([chunk async for chunk in response])
        try:
            payload = json.loads(content)
        except ValueError:
            payload = content.decode(errors="replace")
        yield self._checked(payload, head["status"])

    def _checked(self, payload: Any, status: int) -> dict[str, Any]:
        """Return the engine's payload unless it is an error. Raises RequestError."""
        error = payload.get("error") if isinstance(payload, dict) else payload
        if status < 400 and not error:
            item: dict[str, Any] = payload
            return item
        if status < 400 and isinstance(error, dict) and isinstance(error.get("code"), int):
            status = error["code"]  # an error in the middle of a stream
        text = error.get("message") if isinstance(error, dict) else error or payload
        raise RequestError(f"{self._spec.name} returned {status}: {str(text)[:1000]}", status, payload)

    async def _launch(self) -> Launch:
        """Install everything that the engine needs on this node; return its launch. Raises LLMRunError."""
        spec, root, context = self._spec, self._settings.root, ray.get_runtime_context()
        self._host = ray.util.get_node_ip_address()
        where = f"node {self._host} ({socket.gethostname()})"
        if self._app_file and not Path(self._app_file).is_file():
            raise EngineError(f"{spec.name}: file of its class not found on {where}: {self._app_file}")
        requirements = spec.requirements
        site = await Environments(root, _no_packages).install_requirements(requirements) if requirements else None
        pin, weights = (None, local_weights(spec, where)) if spec.path else await self._fetch_weights(where)
        config = ReplicaConfig(
            spec=spec,
            version=VERSION,
            pin=pin,
            start_timeout=self._settings.start_timeout,
            drain_timeout=self._settings.drain_timeout,
            hook_timeout=self._settings.hook_timeout,
        )
        devices = tuple(context.get_accelerator_ids().get("GPU", ()))
        log = log_path(root, spec.name, VERSION, context.get_actor_id())
        code = Path(self._app_file).parent if self._app_file else None
        members = (Member(context.get_node_id(), self._host, devices),)
        return await asyncio.to_thread(
            lambda: make_launch(config, members, weights, where, code=code, site=site, forkserver=None, log=log)
        )

    async def _fetch_weights(self, where: str) -> tuple[Pin, Path]:
        """Fetch the source's current revision to this node; return its pin and its folder. Raises LLMRunError."""
        env, node = worker_env(self._spec.env, where), NodeWeights(self._settings, self._host)
        try:
            imported = await node.last_import(self._spec.model)
            pin = imported[1] if imported else await node.pin(self._spec.model, env)
            return pin, await node.fetch(pin, env, (), ())
        finally:
            await node.close()


async def _no_packages(digest: str) -> bytes:
    raise EngineError(f"code package {digest[:12]} cannot be fetched without control")

"""The Serve deployment of a model without control: it owns one engine, and is asked through Serve's handles."""

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
from llmrun_runtime.ingress.admission.admit import no_path
from llmrun_runtime.link.client import LinkClient, LinkLostError, Links
from llmrun_runtime.logs import log_path
from llmrun_runtime.node.environments import Environments, worker_environment
from llmrun_runtime.node.launch import find_weights, make_launch
from llmrun_runtime.replica.drain import LINGER_S, drained
from llmrun_runtime.weights.node_weights import NodeWeights
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.wire.headers import TOKEN_HEADER
from llmrun_runtime.wire.replica_config import ReplicaConfig

VERSION = 0
"""There are none without control; the engine's log and cache are called so."""


class LLMServer:
    """One running copy of a model. `spec`: a model's fields as JSON; `app_file`: where its class is, if it has hooks.

    Each of its methods for requests gives an async iterator, for `handle.options(stream=True)`.
    """

    async def __init__(self, spec: dict[str, Any], app_file: str = "") -> None:  # type: ignore[misc]  # Serve awaits it
        """Return when the engine answers. Raises LLMRunError: Serve tries again, and says why."""
        self._settings = Settings()
        self._settings.make_home()
        await asyncio.to_thread(sweep_temp_dirs)  # what a cluster that was killed has left here
        self._spec = ModelSpec.model_validate(spec)
        self._app_file = app_file
        self._links = Links(self._settings.connect_timeout)
        self._engine = EngineProcess(get_engine(self._spec.engine), await self._launch())
        try:
            await self._engine.start()
            await self._engine.ready(self._settings.start_timeout)
            spoken = (await self._engine.state())["paths"]
        except BaseException:
            await self._engine.end()
            raise
        known = get_engine(self._spec.engine).paths
        self._paths = known.intersection(spoken) or known  # not every server says what it has

    async def ask(self, path: str, body: bytes, content_type: str = "application/json") -> AsyncIterator[Any]:
        """Ask one of the engine's inference paths: first `{"status", "content_type"}`, then bytes as they come.

        `.cancel()` of the call ends the engine's work. Raises EngineError if the engine goes away.
        """
        if path not in self._paths:
            refusal = no_path(self._spec.name, path, self._paths)
            yield {"status": refusal.status, "content_type": "application/json"}
            yield json.dumps(refusal.body()).encode()
            return
        headers = [(TOKEN_HEADER, self._engine.token), ("content-type", content_type)]
        headers.append(("content-length", str(len(body))))
        try:
            link: LinkClient = await self._links.get(self._host, self._engine.link)
            with link.ask("POST", path, b"", headers) as answer:
                await link.finish(answer, body)
                await answer.started()
                kind = dict((key.lower(), value) for key, value in answer.headers).get(b"content-type", b"")
                yield {"status": answer.status, "content_type": kind.decode("latin-1")}
                while piece := await answer.read():
                    yield piece
        except (LinkLostError, OSError, TimeoutError) as error:
            raise EngineError(f"the engine of {self._spec.name} went away: {error or type(error).__name__}") from None

    async def chat(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """`/v1/chat/completions`: one answer, or each event of a stream (`"stream": True`).

        Raises RequestError with the model's status and answer if it refuses, EngineError if the engine goes away.
        """
        async for item in self._items("/v1/chat/completions", request):
            yield item

    async def completions(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """`/v1/completions`, as `chat`."""
        async for item in self._items("/v1/completions", request):
            yield item

    async def embeddings(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """`/v1/embeddings`, as `chat`."""
        async for item in self._items("/v1/embeddings", request):
            yield item

    async def check_health(self) -> None:
        """Raise once the engine has died: Serve then replaces this replica."""
        if self._engine.ended():
            raise EngineError(f"the engine died: {self._engine.cause()}")

    async def __del__(self) -> None:
        """Wait until nothing is in flight, and end the engine."""

        async def ask(leave: bool) -> int | None:
            if self._engine.ended():
                return 0
            try:
                state = await (self._engine.leave() if leave else self._engine.state())
            except EngineError:
                return None
            return int(state["in_flight"])

        self._links.close()
        await drained(ask, self._settings.drain_timeout - LINGER_S, linger=0)
        await self._engine.end()

    async def _items(self, path: str, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        body = json.dumps({"model": self._spec.name, **request}).encode()
        answer = self.ask(path, body)
        head = await anext(answer)
        if head["content_type"].startswith("text/event-stream"):
            rest = b""
            async for piece in answer:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        yield self._checked(json.loads(line.removeprefix(b"data: ")), head["status"])
            return
        whole = b"".join([piece async for piece in answer])
        try:
            said = json.loads(whole)
        except ValueError:
            said = whole.decode(errors="replace")
        yield self._checked(said, head["status"])

    def _checked(self, said: Any, status: int) -> dict[str, Any]:
        """What the engine said, if that is an answer or a part of one. Raises RequestError."""
        error = said.get("error") if isinstance(said, dict) else said
        if status < 400 and not error:
            found: dict[str, Any] = said
            return found
        if status < 400 and isinstance(error, dict) and isinstance(error.get("code"), int):
            status = error["code"]  # what went wrong in the middle of a stream
        text = error.get("message") if isinstance(error, dict) else error or said
        raise RequestError(f"{self._spec.name} answered {status}: {str(text)[:1000]}", status, said)

    async def _launch(self) -> Launch:
        """What the engine is started from, brought to this node. Raises LLMRunError."""
        spec, root, context = self._spec, self._settings.root, ray.get_runtime_context()
        self._host = ray.util.get_node_ip_address()
        where = f"node {self._host} ({socket.gethostname()})"
        if self._app_file and not Path(self._app_file).is_file():
            raise EngineError(f"{spec.name}: its class is in {self._app_file}, which is not on {where}")
        requirements = spec.requirements
        site = await Environments(root, _no_packages).requirements(requirements) if requirements else None
        config = ReplicaConfig(
            spec=spec,
            version=VERSION,
            pin=None if spec.path else await self._pin(where),
            start_timeout=self._settings.start_timeout,
            drain_timeout=self._settings.drain_timeout,
            hook_timeout=self._settings.hook_timeout,
        )
        weights = await asyncio.to_thread(find_weights, config, where)
        assert weights
        devices = tuple(context.get_accelerator_ids().get("GPU", ()))
        log = log_path(root, spec.name, VERSION, context.get_actor_id())
        code = Path(self._app_file).parent if self._app_file else None
        members = (Member(context.get_node_id(), self._host, devices),)
        return await asyncio.to_thread(
            lambda: make_launch(config, members, weights, where, code=code, site=site, warm=None, log=log)
        )

    async def _pin(self, where: str) -> Pin:
        """What the source means now; its weights are here then. Raises LLMRunError."""
        env, node = worker_environment(self._spec.env, where), NodeWeights(self._settings, self._host)
        try:
            imported = node.imported(self._spec.model)
            pin = imported[1] if imported else await node.pin(self._spec.model, env)
            await node.bring(pin, env, (), ())
        finally:
            await node.close()
        return pin


async def _no_packages(digest: str) -> bytes:
    raise EngineError(f"there is no control to fetch the package {digest[:12]} from")

"""The weights on one node, for its agent: runs tasks in workers, one per pin at a time, and serves other nodes."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from llmrun.errors import WeightsError
from llmrun.settings import Settings
from llmrun.weights import Weights
from llmrun.wire import WeightsRow
from llmrun_runtime import http
from llmrun_runtime.weights.adapters import AdapterListing
from llmrun_runtime.weights.cache.cache import Manifest, open_cache
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.weights.tasks import (
    FetchTask,
    ImportTask,
    ListAdaptersTask,
    MirrorTask,
    PinTask,
    PushAdapterTask,
    Task,
    VerifyTask,
)
from llmrun_runtime.weights.worker_pool import WorkerPool

# Listing a source takes seconds, or minutes with retries.
PIN_TIMEOUT_S = 300
# Another process may change the cache too (two clusters with one `LLMRUN_WEIGHTS_DIR`), so its size is read again.
SIZE_REFRESH_S = 60


@dataclass(frozen=True)
class CacheInfo:
    """The size of a node's cache, and counts of the pins requested since the agent's start."""

    bytes: int
    found: int
    """Requested pins that were in the cache."""
    fetched: int
    """Requested pins that were fetched."""
    failed: int
    """Requested pins that could not be fetched."""


class NodeWeights:
    """The weights on this node. `host`: its address for other nodes."""

    def __init__(self, settings: Settings, host: str) -> None:
        self.cache = open_cache(settings)
        self._host = host
        self._workers = WorkerPool(f"node {host} ({socket.gethostname()})")
        self._running: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._progress: dict[str, tuple[int, int]] = {}
        self._peer: Peer | None = None
        self._runner: web.AppRunner | None = None
        self._served: dict[str, Manifest | None] = {}
        self._lock = asyncio.Lock()
        self._outcomes: Counter[str] = Counter()
        self._cache_bytes = 0
        self._sized_at: float | None = None

    async def pin(self, weights: Weights, env: Mapping[str, str]) -> Pin:
        """Pin a source's current content, with this node's credentials. Raises WeightsError."""
        return Pin.model_validate(await self._list(PinTask(weights=weights), env))

    async def list_adapters(
        self,
        weights: Weights,
        env: Mapping[str, str],
        known_ranks: dict[str, int] | None,
        known: str = "",
        published: bool = False,
    ) -> AdapterListing:
        """Return the adapters at a source, unless their listing has the digest `known`. Raises WeightsError.

        `known_ranks`: see `list_adapters`. `published`: see ListAdaptersTask.
        """
        task = ListAdaptersTask(weights=weights, known_ranks=known_ranks, known=known, published=published)
        result = await self._list(task, env)
        return await asyncio.to_thread(AdapterListing.model_validate, result)

    async def _list(self, task: PinTask | ListAdaptersTask, env: Mapping[str, str]) -> Any:
        try:
            async with asyncio.timeout(PIN_TIMEOUT_S):
                return await self._run(task, env)
        except TimeoutError:
            text = f"{task.weights}: listing timed out after {PIN_TIMEOUT_S} s: check that the store is reachable"
            raise WeightsError(text) from None

    async def last_import(self, weights: Weights) -> tuple[float, Pin] | None:
        """Return the latest import of that name and its time (Unix time); None if there is none."""
        imports = [
            (manifest.made, manifest.pin)
            for manifest, _ in await self._manifests()
            if manifest.pin.imported and manifest.pin.weights.canonical == weights.canonical
        ]
        return max(imports, key=lambda item: item[0], default=None)

    async def fetch(self, pin: Pin, env: Mapping[str, str], peers: Sequence[Peer], keep: Collection[str]) -> Path:
        """Return the folder of the complete pin; fetch it if necessary, once for all callers. Raises WeightsError."""
        manifest = await asyncio.to_thread(self.cache.find, pin.id)
        if manifest:
            self.count_cache_hit()
            self.cache.touch(pin.id)
            return self.cache.folder(pin.id)
        task = FetchTask(pin=pin, peers=tuple(peers), keep=tuple(keep))
        first = (task.kind, pin.id) not in self._running
        try:
            folder = await self._run_once(pin.id, task, env)
        except WeightsError:
            self._outcomes["failed"] += first
            raise
        self._outcomes["fetched"] += first
        return Path(folder)

    def count_cache_hit(self) -> None:
        """Count a requested pin that was in the cache."""
        self._outcomes["found"] += 1

    async def cache_info(self) -> CacheInfo:
        """Return figures for metrics; the disk is read only if the cache may have changed."""
        now = time.monotonic()
        if self._sized_at is None or now - self._sized_at > SIZE_REFRESH_S:
            self._sized_at = now
            self._cache_bytes = await asyncio.to_thread(self.cache.used_bytes)
        return CacheInfo(self._cache_bytes, *(self._outcomes[outcome] for outcome in ("found", "fetched", "failed")))

    async def import_folder(
        self, folder: str, weights: Weights, keep: Collection[str], env: Mapping[str, str]
    ) -> Pin | None:
        """Import a folder of this node; None if it does not exist here. Raises WeightsError."""
        if not Path(folder).is_dir():
            return None
        task = ImportTask(folder=folder, weights=weights, keep=tuple(keep))
        return Pin.model_validate(await self._run_once(f"{weights.canonical} {folder}", task, env))

    async def mirror(self, pin: Pin, target: Weights, env: Mapping[str, str]) -> dict[str, int]:
        """Upload a complete pin. Return the numbers of files; see `mirror`. Raises WeightsError."""
        counts: dict[str, int] = await self._run_once(pin.id, MirrorTask(pin=pin, target=target), env)
        return counts

    async def push_adapter(self, folder: str, target: Weights, env: Mapping[str, str]) -> None:
        """Copy an adapter's files to the target. Raises WeightsError."""
        await self._run_once(folder, PushAdapterTask(folder=folder, target=target), env)

    async def verify(self, pin_ids: Collection[str], env: Mapping[str, str]) -> dict[str, list[str]]:
        """Hash the files of the given pins again. Return the problems by pin."""
        return {
            manifest.pin.id: await self._run_once(manifest.pin.id, VerifyTask(pin=manifest.pin), env)
            for manifest, _ in await self._manifests()
            if manifest.pin.id in pin_ids
        }

    async def remove(self, pin_ids: Collection[str]) -> int:
        """Remove the given pins. Return the bytes freed."""
        manifests = [manifest for manifest, _ in await self._manifests() if manifest.pin.id in pin_ids]
        freed = [await asyncio.to_thread(self.cache.remove, manifest) for manifest in manifests]
        self._sized_at = None
        return sum(freed)

    async def prune(self, keep: Collection[str]) -> int:
        """Remove all pins except `keep`, and unused files. Return the bytes freed."""
        others = [manifest.pin.id for manifest, _ in await self._manifests() if manifest.pin.id not in keep]
        freed = await self.remove(others) + await asyncio.to_thread(self.cache.prune)
        self._sized_at = None
        return freed

    async def _manifests(self) -> list[tuple[Manifest, float]]:
        """See `Cache.manifests`. In a thread: 10,000 adapters take seconds."""
        return await asyncio.to_thread(lambda: list(self.cache.manifests()))

    async def has_pin(self, pin_id: str) -> bool:
        """Whether the pin is complete here, judged by sizes and mtimes."""

        def check() -> bool:
            manifest = self.cache.load(pin_id)
            return manifest is not None and self.cache.is_complete(manifest)

        return await asyncio.to_thread(check)

    async def list_weights(self) -> list[WeightsRow]:
        """Return one row per complete pin."""
        return [
            WeightsRow(
                source=str(manifest.pin.weights),
                pin=manifest.pin.id,
                short=manifest.pin.short,
                bytes=manifest.pin.total,
                files=len(manifest.entries),
                last_used=last_used,
                node=self._host,
            )
            for manifest, last_used in await self._manifests()
        ]

    def progress(self, key: str) -> tuple[int, int]:
        """Return the bytes complete and in total of a running task: by pin, or `SOURCE FOLDER` of an import."""
        return self._progress.get(key, (0, 0))

    async def serve_peers(self) -> Peer:
        """Serve this node's weights to other nodes from the first call on. Return the address and token."""
        async with self._lock:
            return self._peer or await self._start_server()

    async def _start_server(self) -> Peer:
        token = secrets.token_hex(32)

        async def serve(request: web.Request) -> web.StreamResponse:
            return await self._serve(request, token)

        app = web.Application()
        app.router.add_get("/{pin}", serve)
        app.router.add_get("/{pin}/{name:.+}", serve)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        listener = http.bind(self._host, 0)
        await web.SockSite(self._runner, listener).start()
        self._peer = Peer(url=http.http_url(self._host, listener.getsockname()[1]), token=token)
        return self._peer

    async def close(self) -> None:
        """Stop serving other nodes, and end the workers."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._workers.close()
        if self._runner:
            await self._runner.cleanup()

    async def _serve(self, request: web.Request, token: str) -> web.StreamResponse:
        """Respond with a manifest, or with one of its files (with ranges, by sendfile)."""
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            return web.Response(status=401)
        pin_id, name = request.match_info["pin"], request.match_info.get("name")
        if name is None:  # a peer requests the manifest first; the pin is not checked again for each file
            self._served[pin_id] = await asyncio.to_thread(self.cache.find, pin_id)
        manifest = self._served.get(pin_id)
        if manifest is None or (name is not None and name not in manifest.entries):
            return web.Response(status=404)
        if name is None:
            return web.Response(text=manifest.model_dump_json(), content_type="application/json")
        path = self.cache.path_of(manifest.entries[name])
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    async def _run_once(self, key: str, task: Task, env: Mapping[str, str]) -> Any:
        """Run a task, or wait for the running one of that kind and key. It continues if its caller is cancelled."""
        running = self._running.get((task.kind, key))
        if running is None:
            running = asyncio.get_running_loop().create_task(self._run(task, env, key))
            self._running[task.kind, key] = running
            running.add_done_callback(lambda done: self._forget(task.kind, key, done))
        return await asyncio.shield(running)

    def _forget(self, kind: str, key: str, done: asyncio.Task[Any]) -> None:
        del self._running[kind, key]
        self._progress.pop(key, None)
        self._sized_at = None
        if not done.cancelled():
            done.exception()  # mark it as retrieved: the callers got it from the task

    async def _run(self, task: Task, env: Mapping[str, str], key: str = "") -> Any:
        def progress(complete: int, total: int) -> None:
            self._progress[key] = (complete, total)

        return await self._workers.run(task, env, progress)

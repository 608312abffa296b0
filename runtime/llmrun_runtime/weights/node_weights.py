"""A node's weights, as its agent sees them: sends errands to workers, one per pin at a time, and serves other nodes."""

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
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.weights.cache.cache import Manifest, open_cache
from llmrun_runtime.weights.fetch import Peer
from llmrun_runtime.weights.pin import Pin
from llmrun_runtime.weights.worker import WorkerTask
from llmrun_runtime.weights.worker_pool import WorkerPool

# Asking a store takes seconds, or minutes where it must be asked again and again.
PIN_TIMEOUT_S = 300
# Another process may change the cache too (`LLMRUN_WEIGHTS_DIR` of two clusters): its size is looked at so often.
SIZE_S = 60


@dataclass(frozen=True)
class CacheInfo:
    """What lies in a node's cache, and what it was asked for since the agent's start."""

    bytes: int
    found: int
    """Pins that were needed, and were here."""
    brought: int
    """Those that were not, and came."""
    failed: int
    """Those that did not come."""


class NodeWeights:
    """The cache of this node. `host`: its address for other nodes."""

    def __init__(self, settings: Settings, host: str) -> None:
        self.cache = open_cache(settings)
        self._host = host
        self._workers = WorkerPool(f"node {host} ({socket.gethostname()})")
        self._running: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._progress: dict[str, tuple[int, int]] = {}
        self._peer: Peer | None = None
        self._runner: web.AppRunner | None = None
        self._given: dict[str, Manifest | None] = {}
        self._lock = asyncio.Lock()
        self._needed: Counter[str] = Counter()
        self._bytes = 0
        self._sized: float | None = None

    async def pin(self, weights: Weights, env: Mapping[str, str]) -> Pin:
        """What the source means now, asked with this node's credentials. Raises WeightsError."""
        return Pin.model_validate(await self._list(WorkerTask(do="pin", weights=weights), env))

    async def adapters(self, weights: Weights, env: Mapping[str, str], ranks: dict[str, int] | None) -> list[Adapter]:
        """The adapters that lie at a source now; `ranks`: see `list_adapters`. Raises WeightsError."""
        found = await self._list(WorkerTask(do="adapters", weights=weights, ranks=ranks), env)
        return [Adapter.model_validate(item) for item in found]

    async def _list(self, errand: WorkerTask, env: Mapping[str, str]) -> Any:
        """Ask a source what it has. Raises WeightsError."""
        try:
            async with asyncio.timeout(PIN_TIMEOUT_S):
                return await self._send(errand, env)
        except TimeoutError:
            text = f"{errand.weights}: it was not listed within {PIN_TIMEOUT_S} s: is the store slow?"
            raise WeightsError(text) from None

    def imported(self, weights: Weights) -> tuple[float, Pin] | None:
        """What was imported here last under that name, and when (Unix time); None if nothing was."""
        found = [
            (manifest.made, manifest.pin)
            for manifest, _ in self.cache.manifests()
            if manifest.pin.imported and manifest.pin.weights.canonical == weights.canonical
        ]
        return max(found, key=lambda item: item[0], default=None)

    async def bring(self, pin: Pin, env: Mapping[str, str], peers: Sequence[Peer], keep: Collection[str]) -> Path:
        """The folder of the complete pin; brought here if need be, once for all who ask. Raises WeightsError."""
        found = await asyncio.to_thread(self.cache.find, pin.id)
        if found:
            self.found()
            self.cache.used(pin.id)
            return self.cache.folder(pin.id)
        first = ("bring", pin.id) not in self._running
        errand = WorkerTask(do="bring", pin=pin, peers=tuple(peers), keep=tuple(keep))
        try:
            folder = await self._once(pin.id, errand, env)
        except WeightsError:
            self._needed["failed"] += first
            raise
        self._needed["brought"] += first
        return Path(folder)

    def found(self) -> None:
        """Note that a pin was needed, and was here."""
        self._needed["found"] += 1

    async def cache_facts(self) -> CacheInfo:
        """For metrics; disks are looked at only if something may have changed."""
        now = time.monotonic()
        if self._sized is None or now - self._sized > SIZE_S:
            self._sized = now
            self._bytes = await asyncio.to_thread(self.cache.held)
        return CacheInfo(self._bytes, *(self._needed[how] for how in ("found", "brought", "failed")))

    async def take(self, folder: str, weights: Weights, keep: Collection[str], env: Mapping[str, str]) -> Pin | None:
        """Import a folder of this node; None if there is no such folder here. Raises WeightsError."""
        if not Path(folder).is_dir():
            return None
        errand = WorkerTask(do="import", folder=folder, weights=weights, keep=tuple(keep))
        return Pin.model_validate(await self._once(f"{weights.canonical} {folder}", errand, env))

    async def mirror(self, pin: Pin, target: Weights, env: Mapping[str, str]) -> dict[str, int]:
        """Upload a complete pin; files sent, and files that were there. Raises WeightsError."""
        found: dict[str, int] = await self._once(pin.id, WorkerTask(do="mirror", pin=pin, target=target), env)
        return found

    async def push(self, folder: str, target: Weights, env: Mapping[str, str]) -> None:
        """Copy an adapter's files to their place. Raises WeightsError."""
        await self._once(folder, WorkerTask(do="push", folder=folder, target=target), env)

    async def verify(self, pin_ids: Collection[str], env: Mapping[str, str]) -> dict[str, list[str]]:
        """Hash the files of those pins that are here again; what is wrong, by pin."""
        return {
            manifest.pin.id: await self._once(manifest.pin.id, WorkerTask(do="verify", pin=manifest.pin), env)
            for manifest in self._chosen(pin_ids)
        }

    async def remove(self, pin_ids: Collection[str]) -> int:
        """Remove those pins that are here; the bytes freed."""
        freed = [await asyncio.to_thread(self.cache.remove, manifest) for manifest in self._chosen(pin_ids)]
        self._sized = None
        return sum(freed)

    async def prune(self, keep: Collection[str]) -> int:
        """Remove all pins but `keep`, and what nothing uses; the bytes freed."""
        rest = [manifest.pin.id for manifest, _ in self.cache.manifests() if manifest.pin.id not in keep]
        freed = await self.remove(rest) + await asyncio.to_thread(self.cache.prune)
        self._sized = None
        return freed

    def _chosen(self, pin_ids: Collection[str]) -> list[Manifest]:
        return [manifest for manifest, _ in self.cache.manifests() if manifest.pin.id in pin_ids]

    async def has(self, pin_id: str) -> bool:
        """Whether the pin is complete here, by sizes and times."""
        manifest = self.cache.load(pin_id)
        return manifest is not None and await asyncio.to_thread(self.cache.is_complete, manifest)

    def rows(self) -> list[WeightsRow]:
        """What lies here."""
        return [
            WeightsRow(
                source=str(manifest.pin.weights),
                pin=manifest.pin.id,
                short=manifest.pin.short,
                bytes=manifest.pin.total,
                files=len(manifest.entries),
                last_used=used,
                node=self._host,
            )
            for manifest, used in self.cache.manifests()
        ]

    def progress(self, key: str) -> tuple[int, int]:
        """Bytes here, and bytes in all, of what is under way."""
        return self._progress.get(key, (0, 0))

    async def peer(self) -> Peer:
        """How other nodes reach what lies here; listens from the first call on."""
        async with self._lock:
            return self._peer or await self._listen()

    async def _listen(self) -> Peer:
        token = secrets.token_hex(32)

        async def give(request: web.Request) -> web.StreamResponse:
            return await self._give(request, token)

        app = web.Application()
        app.router.add_get("/{pin}", give)
        app.router.add_get("/{pin}/{name:.+}", give)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        listening = socket.create_server((self._host, 0))
        await web.SockSite(self._runner, listening).start()
        self._peer = Peer(url=f"http://{self._host}:{listening.getsockname()[1]}", token=token)
        return self._peer

    async def close(self) -> None:
        """Stop giving to other nodes, and end the workers."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._workers.close()
        if self._runner:
            await self._runner.cleanup()

    async def _give(self, request: web.Request, token: str) -> web.StreamResponse:
        """A manifest, or one of its files (with ranges, by sendfile)."""
        if not hmac.compare_digest(request.headers.get("Authorization", ""), f"Bearer {token}"):
            return web.Response(status=401)
        pin_id, name = request.match_info["pin"], request.match_info.get("name")
        if name is None:  # a peer begins with this; what it then asks for is not compared as a whole each time
            self._given[pin_id] = await asyncio.to_thread(self.cache.find, pin_id)
        manifest = self._given.get(pin_id)
        if manifest is None or (name is not None and name not in manifest.entries):
            return web.Response(status=404)
        if name is None:
            return web.Response(text=manifest.model_dump_json(), content_type="application/json")
        place = self.cache.where(manifest.entries[name])
        return web.FileResponse(place) if place.is_file() else web.Response(status=404)

    async def _once(self, key: str, errand: WorkerTask, env: Mapping[str, str]) -> Any:
        """Send an errand, or wait for the one of that key that is under way. It goes on if who asked goes away."""
        task = self._running.get((errand.do, key))
        if task is None:
            task = asyncio.get_running_loop().create_task(self._send(errand, env, key))
            self._running[errand.do, key] = task
            task.add_done_callback(lambda done: self._forget(errand.do, key, done))
        return await asyncio.shield(task)

    def _forget(self, do: str, key: str, task: asyncio.Task[Any]) -> None:
        del self._running[do, key]
        self._progress.pop(key, None)
        self._sized = None
        if not task.cancelled():
            task.exception()  # whoever waited has it

    async def _send(self, errand: WorkerTask, env: Mapping[str, str], key: str = "") -> Any:
        def progress(here: int, total: int) -> None:
            self._progress[key] = (here, total)

        return await self._workers.send(errand, env, progress)

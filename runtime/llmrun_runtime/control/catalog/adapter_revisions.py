"""Adapters at a revision that a client names, `model:adapter@revision`: resolved at their source on first use."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field

from llmrun.errors import LLMRunError, NotFound
from llmrun.lora import REVISION, split_revision
from llmrun_runtime.weights.adapters import Adapter
from llmrun_runtime.wire.reports import AdapterRevision

log = logging.getLogger("llmrun.control")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Clients choose revisions, so the caches and the number of requests to sources are bounded.
MAX_CACHED, MAX_PARALLEL, MAX_PENDING = 1000, 4, 64
MISSING_TTL_S = 10.0
# If a source is slower than this, clients get the revision's last resolution.
WAIT_LIMIT_S = 2.0
Resolve = Callable[[str, str, str], Awaitable[Adapter]]
"""From model, adapter and revision. Raises LLMRunError; NotFound if the source has no such revision."""


@dataclass
class RevisionEntry:
    """One resolved revision, or why it could not be resolved."""

    adapter: Adapter | None
    reply: AdapterRevision
    previous: Adapter | None = None
    """The adapter before the revision last moved."""
    resolved_at: float = field(default_factory=time.monotonic)


class AdapterRevisions:
    """The revisions of all models. A commit is resolved once; a branch or tag again after `refresh` seconds."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._cached: dict[tuple[str, str], RevisionEntry] = {}
        """By model and `adapter@revision`, the most recently resolved last."""
        self._failed: dict[tuple[str, str], RevisionEntry] = {}
        """Unresolved revisions, in the same order. Separate, so that they evict no resolved ones."""
        self._pending: dict[tuple[str, str], asyncio.Task[RevisionEntry]] = {}
        self._generations: dict[str, int] = {}
        """How often the sources of models have changed while revisions of theirs were being resolved."""
        self._semaphore = asyncio.Semaphore(MAX_PARALLEL)

    async def find(self, model: str, revised: str, refresh: float) -> AdapterRevision:
        """Return what `revised`, an `adapter@revision`, refers to now, at most `refresh` seconds old."""
        key, now = (model, revised), time.monotonic()
        if not REVISION.fullmatch(split_revision(revised)[1]):
            return AdapterRevision(error="invalid revision: it must be a branch, a tag or a commit", missing=True)
        entry, failed = self._cached.get(key), self._failed.get(key)
        if entry and _fresh(entry, revised, refresh, now):
            return entry.reply
        if failed and now - failed.resolved_at < MISSING_TTL_S:
            return failed.reply
        task = self._pending.get(key)
        if task is None:
            if len(self._pending) >= MAX_PENDING:
                busy = AdapterRevision(error=f"too many revisions are being resolved (limit: {MAX_PENDING})")
                return entry.reply if entry else busy
            task = self._pending[key] = asyncio.get_running_loop().create_task(self._refresh(key))
            task.add_done_callback(lambda _: self._pending.pop(key))
        await asyncio.wait({task}, timeout=WAIT_LIMIT_S if entry else None)
        return entry.reply if entry and not task.done() else task.result().reply

    def adapters(self, model: str, revised: str) -> list[Adapter]:
        """Return the current adapter, then the previous one, which requests in progress may use."""
        entry = self._cached.get((model, revised))
        return [adapter for adapter in (entry.adapter, entry.previous) if adapter] if entry else []

    def keep(self, model: str, names: Collection[str]) -> None:
        """Forget the revisions of adapters that are not in `names`."""
        self._cached = {
            (owner, revised): entry
            for (owner, revised), entry in self._cached.items()
            if owner != model or split_revision(revised)[0] in names
        }

    def pins(self, model: str, refresh: float) -> dict[str, str]:
        """Return the model's pins that are still fresh, by `adapter@revision`."""
        now = time.monotonic()
        return {
            revised: entry.reply.pin
            for (owner, revised), entry in self._cached.items()
            if owner == model and entry.adapter and _fresh(entry, revised, refresh, now)
        }

    def forget(self, model: str) -> None:
        """Forget a model's revisions, also those being resolved: its sources have changed, or it was removed."""
        resolving = {owner for owner, _ in self._pending}
        self._generations = {owner: count for owner, count in self._generations.items() if owner in resolving}
        if model in resolving:
            self._generations[model] = self._generations.get(model, 0) + 1
        self._cached = {key: entry for key, entry in self._cached.items() if key[0] != model}

    async def _refresh(self, key: tuple[str, str]) -> RevisionEntry:
        """Resolve a revision. If its source is not reachable, the last resolution stays valid."""
        model, revised = key
        name, revision = split_revision(revised)
        old, generation = self._cached.get(key), self._generations.get(model, 0)
        try:
            async with self._semaphore:
                adapter = await self._resolve(model, name, revision)
            moved = old and old.adapter and old.adapter.pin.id != adapter.pin.id
            previous = (old.adapter if moved else old.previous) if old else None
            entry = RevisionEntry(adapter, AdapterRevision(adapter.pin.id), previous)
        except LLMRunError as error:
            if old and old.adapter and not isinstance(error, NotFound):
                log.warning("%s:%s: %s; keeping its last pin %s", model, revised, error, old.reply.pin)
                entry = RevisionEntry(old.adapter, old.reply, old.previous)
            else:
                entry = RevisionEntry(None, AdapterRevision(error=str(error), missing=isinstance(error, NotFound)))
        if self._generations.get(model, 0) != generation:
            return RevisionEntry(None, AdapterRevision(error=f"{model} was redeployed during the request"))
        self._cached.pop(key, None)
        self._failed.pop(key, None)
        cache = self._cached if entry.adapter else self._failed
        while len(cache) >= MAX_CACHED:
            del cache[next(iter(cache))]
        cache[key] = entry
        return entry


def _fresh(entry: RevisionEntry, revised: str, refresh: float, now: float) -> bool:
    commit = COMMIT.fullmatch(split_revision(revised)[1]) is not None
    return entry.adapter is not None and (commit or now - entry.resolved_at < refresh)

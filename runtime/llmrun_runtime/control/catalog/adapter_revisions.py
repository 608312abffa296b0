"""Adapters at revisions that callers name, `model:adapter@revision`: asked of their sources when first wanted."""

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
# Callers choose them, so what is kept is bounded, and so is what is asked for at once.
KEPT, AT_ONCE, MOST_ASKED = 1000, 4, 64
WRONG_S = 10.0
# A source that is slower than this does not keep callers from what their revision meant when it was last asked.
PATIENCE_S = 2.0
Ask = Callable[[str, str, str], Awaitable[Adapter]]
"""Model, adapter, revision. Raises LLMRunError; NotThere if there is none."""


@dataclass
class RevisionEntry:
    """What is known of one; `asked` is of the monotonic clock, `before` what it meant until it moved."""

    adapter: Adapter | None
    said: AdapterRevision
    before: Adapter | None = None
    asked: float = field(default_factory=time.monotonic)


class AdapterRevisions:
    """Those of all models. A commit is asked for once; a branch or tag again when it is older than `refresh`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._known: dict[tuple[str, str], RevisionEntry] = {}
        """By model and `adapter@revision`, the one asked for last at the end."""
        self._wrong: dict[tuple[str, str], RevisionEntry] = {}
        """Those that there are not, in the same way: they push none of the others out."""
        self._asking: dict[tuple[str, str], asyncio.Task[RevisionEntry]] = {}
        self._changes: dict[str, int] = {}
        """By model, how often its sources have changed."""
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def find(self, model: str, called: str, refresh: float) -> AdapterRevision:
        """What `adapter@revision` means now; `refresh`: seconds for which that is so."""
        key, now = (model, called), time.monotonic()
        if not REVISION.fullmatch(split_revision(called)[1]):
            return AdapterRevision(trouble="a revision is a branch, a tag or a commit", missing=True)
        entry, wrong = self._known.get(key), self._wrong.get(key)
        if entry and _fresh(entry, called, refresh, now):
            return entry.said
        if wrong and now - wrong.asked < WRONG_S:
            return wrong.said
        task = self._asking.get(key)
        if task is None:
            if len(self._asking) >= MOST_ASKED:
                return (
                    entry.said
                    if entry
                    else AdapterRevision(trouble=f"{MOST_ASKED} other revisions are being asked for")
                )
            task = self._asking[key] = asyncio.get_running_loop().create_task(self._look(key))
            task.add_done_callback(lambda _: self._asking.pop(key))
        await asyncio.wait({task}, timeout=PATIENCE_S if entry else None)
        return entry.said if entry and not task.done() else task.result().said

    def adapters(self, model: str, called: str) -> list[Adapter]:
        """What it means, and what it meant before that, for requests under way."""
        entry = self._known.get((model, called))
        return [adapter for adapter in (entry.adapter, entry.before) if adapter] if entry else []

    def keep(self, model: str, names: Collection[str]) -> None:
        """Forget those of adapters that the model has no more."""
        self._known = {
            (theirs, called): entry
            for (theirs, called), entry in self._known.items()
            if theirs != model or split_revision(called)[0] in names
        }

    def pins(self, model: str, refresh: float) -> dict[str, str]:
        """Those of a model that need not be asked for now, by `adapter@revision`."""
        now = time.monotonic()
        return {
            called: entry.said.pin
            for (theirs, called), entry in self._known.items()
            if theirs == model and entry.adapter and _fresh(entry, called, refresh, now)
        }

    def forget(self, model: str) -> None:
        """Its sources have changed, or it is gone; what is being asked for now is not kept."""
        self._changes[model] = self._changes.get(model, 0) + 1
        self._known = {key: entry for key, entry in self._known.items() if key[0] != model}

    async def _look(self, key: tuple[str, str]) -> RevisionEntry:
        """While its source is away, a revision goes on to mean what it did."""
        model, called = key
        name, revision = split_revision(called)
        before, changes = self._known.get(key), self._changes.get(model, 0)
        try:
            async with self._gate:
                adapter = await self._ask(model, name, revision)
            moved = before and before.adapter and before.adapter.pin.id != adapter.pin.id
            last = (before.adapter if moved else before.before) if before else None
            entry = RevisionEntry(adapter, AdapterRevision(adapter.pin.id), last)
        except LLMRunError as error:
            if before and before.adapter and not isinstance(error, NotFound):
                log.warning("%s:%s: %s; it goes on to mean %s", model, called, error, before.said.pin)
                entry = RevisionEntry(before.adapter, before.said, before.before)
            else:
                entry = RevisionEntry(None, AdapterRevision(trouble=str(error), missing=isinstance(error, NotFound)))
        if self._changes.get(model, 0) != changes:
            return RevisionEntry(None, AdapterRevision(trouble=f"{model} has been deployed anew meanwhile"))
        self._known.pop(key, None)
        self._wrong.pop(key, None)
        kept = self._known if entry.adapter else self._wrong
        while len(kept) >= KEPT:
            del kept[next(iter(kept))]
        kept[key] = entry
        return entry


def _fresh(entry: RevisionEntry, called: str, refresh: float, now: float) -> bool:
    commit = COMMIT.fullmatch(split_revision(called)[1]) is not None
    return entry.adapter is not None and (commit or now - entry.asked < refresh)

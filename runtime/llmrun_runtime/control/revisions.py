"""Adapters at revisions that callers name, `model:adapter@revision`: asked of their sources when first wanted."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from llmrun.errors import LLMRunError, NotThere
from llmrun.lora import split_revision
from llmrun_runtime.reports import Revision
from llmrun_runtime.weights.adapters import Adapter

log = logging.getLogger("llmrun.control")
# As git and the Hub name branches, tags and commits; no spaces, for it stands in a header.
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
COMMIT = re.compile(r"[0-9a-f]{40}")
# Callers choose them, so what is kept is bounded, and so is what is asked for at once.
KEPT, AT_ONCE = 1000, 4
WRONG_S = 10.0
Ask = Callable[[str, str, str], Awaitable[Adapter]]
"""Model, adapter, revision. Raises LLMRunError; NotThere if there is none."""


@dataclass
class Entry:
    """What is known of one; `asked` is of the monotonic clock."""

    adapter: Adapter | None
    said: Revision
    asked: float = field(default_factory=time.monotonic)


class Revisions:
    """Those of all models. A commit is asked for once; a branch or tag again when it is older than `refresh`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._known: dict[tuple[str, str], Entry] = {}
        """By model and `adapter@revision`, the one asked for last at the end."""
        self._asking: dict[tuple[str, str], asyncio.Task[Entry]] = {}
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def find(self, model: str, called: str, refresh: float) -> Revision:
        """What `adapter@revision` means now; `refresh`: seconds for which that is so."""
        key, now = (model, called), time.monotonic()
        entry = self._known.get(key)
        if entry and (_fresh(entry, called, refresh, now) or (not entry.adapter and now - entry.asked < WRONG_S)):
            return entry.said
        if key not in self._asking:
            task = asyncio.get_running_loop().create_task(self._look(key))
            self._asking[key] = task
            task.add_done_callback(lambda _: self._asking.pop(key))
        return (await asyncio.shield(self._asking[key])).said

    def adapter(self, model: str, called: str) -> Adapter | None:
        """One that was found, whether or not it means something else by now."""
        entry = self._known.get((model, called))
        return entry.adapter if entry else None

    def pins(self, model: str, refresh: float) -> dict[str, str]:
        """Those of a model that need not be asked for now, by `adapter@revision`."""
        now = time.monotonic()
        return {
            called: entry.said.pin
            for (theirs, called), entry in self._known.items()
            if theirs == model and entry.adapter and _fresh(entry, called, refresh, now)
        }

    def forget(self, model: str) -> None:
        """Its sources have changed, or it is gone."""
        self._known = {key: entry for key, entry in self._known.items() if key[0] != model}

    async def _look(self, key: tuple[str, str]) -> Entry:
        """While its source is away, a revision goes on to mean what it did."""
        model, called = key
        name, revision = split_revision(called)
        before = self._known.get(key)
        try:
            if not REVISION.fullmatch(revision):
                raise NotThere("a revision is a branch, a tag or a commit")
            async with self._gate:
                adapter = await self._ask(model, name, revision)
            entry = Entry(adapter, Revision(adapter.pin.id))
        except LLMRunError as error:
            if before and before.adapter and not isinstance(error, NotThere):
                log.warning("%s:%s: %s; it goes on to mean %s", model, called, error, before.said.pin)
                entry = Entry(before.adapter, before.said)
            else:
                entry = Entry(None, Revision(trouble=str(error), missing=isinstance(error, NotThere)))
        self._known.pop(key, None)
        while len(self._known) >= KEPT:
            del self._known[next(iter(self._known))]
        self._known[key] = entry
        return entry


def _fresh(entry: Entry, called: str, refresh: float, now: float) -> bool:
    commit = COMMIT.fullmatch(split_revision(called)[1]) is not None
    return entry.adapter is not None and (commit or now - entry.asked < refresh)

"""An engine's adapter slots: loads an adapter for the first request that needs it, unloads the least recently used.

Runs in the engine's process. How an adapter is loaded depends on the engine (`Loader`). Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrun_runtime.engines.base import Loader, TokenLogprobs

log = logging.getLogger("llmrun.adapters")
# Concurrent fetches; bounds the connections to an object store that hangs.
MAX_FETCHES = 16
# How long adapters in use may keep others out, and how long a request waits for a slot in total.
YIELD_AFTER_S, SLOT_TIMEOUT_S = 2.0, 30.0


class AdapterError(Exception):
    """An adapter cannot be used; `status` is the HTTP status of the answer."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(eq=False)
class Slot:
    """One adapter that is loaded or being loaded."""

    name: str
    pin: str
    ready: asyncio.Future[Any]
    users: int = 0
    leaving: bool = False
    """It accepts no new users, and is unloaded after its last one."""

    @property
    def adapter(self) -> Any:
        """The loaded adapter; None while it is being loaded, or if that failed."""
        return self.ready.result() if self.ready.done() and not self.ready.exception() else None


FetchAdapter = Callable[[str, str], Awaitable[Path]]
Check = Callable[[str, str, list[TokenLogprobs]], Awaitable[None]]


class AdapterSlots:
    """At most `slots` adapters at once.

    `fetch`: returns the folder for a name and a pin; raises AdapterError. `check`: receives the name, the pin and the
    probed answers after each load; raises AdapterError.
    """

    def __init__(self, loader: Loader, slots: int, fetch: FetchAdapter, check: Check | None = None) -> None:
        self._loader = loader
        self._capacity = slots
        self._fetch = fetch
        self._check = check
        self._slots: dict[str, Slot] = {}
        """By pin, the least recently used first."""
        self._changed = asyncio.Condition()
        self._fetches: dict[str, asyncio.Task[Path]] = {}
        self._fetch_limit = asyncio.Semaphore(MAX_FETCHES)
        self._tasks: set[asyncio.Task[None]] = set()

    def loaded(self) -> list[str]:
        """Return the pins of the adapters that are ready for use."""
        return [pin for pin, slot in self._slots.items() if slot.adapter and not slot.leaving]

    @contextlib.asynccontextmanager
    async def using(self, name: str, pin: str) -> AsyncIterator[None]:
        """Keep the adapter loaded in this context, and use it for this task's requests. Raises AdapterError."""
        slot = await self._acquire(name, pin)
        try:
            adapter = await asyncio.shield(slot.ready)
            with self._loader.using(adapter):
                yield
        finally:
            slot.users -= 1
            if slot.leaving and not slot.users and slot.adapter:
                self._start(self._unload(slot))
            async with self._changed:
                self._changed.notify_all()

    async def _acquire(self, name: str, pin: str) -> Slot:
        """Return the adapter's slot, with one more user. Raises AdapterError.

        1. A slot that is loaded or being loaded is shared.
        2. The files are fetched. This takes no slot, so a slow object store does not affect loaded adapters.
        3. If a slot is free, the adapter is loaded into it.
        4. Otherwise the least recently used adapter without users is unloaded first.
        5. If all are in use for YIELD_AFTER_S, the least recently used accepts no new users and is unloaded after its
           last.
        """
        loop = asyncio.get_running_loop()
        # 1.
        if slot := self._share(pin):
            return slot
        # 2.
        folder = await self._fetch_once(name, pin)
        started = loop.time()
        async with self._changed:
            while True:
                if slot := self._share(pin):
                    return slot
                waited = loop.time() - started
                # 3.
                if pin not in self._slots and len(self._slots) < self._capacity:
                    self._slots[pin] = slot = Slot(name, pin, loop.create_future(), users=1)
                    self._start(self._load(slot, folder))
                    return slot
                if waited >= SLOT_TIMEOUT_S:
                    text = f"timed out after {SLOT_TIMEOUT_S:g} s: all {self._capacity} adapter slots are in use"
                    raise AdapterError(f"{text} (max_loaded)", 503)
                others = [other for other in self._slots.values() if other.adapter]
                leaving = [other for other in others if other.leaving]
                idle = next((other for other in others if not other.users), None)
                # 4.
                if idle and not idle.leaving:
                    self._retire(idle)
                # 5.
                elif others and not leaving and waited >= YIELD_AFTER_S:
                    self._retire(others[0])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout((YIELD_AFTER_S if waited < YIELD_AFTER_S else SLOT_TIMEOUT_S) - waited):
                        await self._changed.wait()

    def _share(self, pin: str) -> Slot | None:
        """Return an existing slot that accepts users, with one more user."""
        slot = self._slots.get(pin)
        if not slot or slot.leaving:
            return None
        self._slots[pin] = self._slots.pop(pin)
        slot.users += 1
        return slot

    def _retire(self, slot: Slot) -> None:
        """Accept no new users; unload the adapter now if it has none."""
        slot.leaving = True
        if not slot.users:
            self._start(self._unload(slot))

    async def _fetch_once(self, name: str, pin: str) -> Path:
        """Return its folder; concurrent callers share one fetch. Raises AdapterError."""
        task = self._fetches.get(pin)
        if not task:
            work = self._fetch_limited(name, pin)
            task = self._fetches[pin] = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
            task.add_done_callback(lambda done: self._fetched(pin, done))
        return await asyncio.shield(task)

    def _fetched(self, pin: str, task: asyncio.Task[Path]) -> None:
        del self._fetches[pin]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: every caller may have left

    async def _fetch_limited(self, name: str, pin: str) -> Path:
        try:
            async with asyncio.timeout(SLOT_TIMEOUT_S):
                await self._fetch_limit.acquire()
        except TimeoutError:
            text = f"timed out after {SLOT_TIMEOUT_S:g} s: {MAX_FETCHES} other adapters are being fetched"
            raise AdapterError(text, 503) from None
        try:
            return await self._fetch(name, pin)
        finally:
            self._fetch_limit.release()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run it in a separate task, which continues if its caller leaves: other callers may wait for it.

        The task has an empty context, so that the engine's work for it is attributed to no request.
        """
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, slot: Slot, folder: Path) -> None:
        try:
            adapter = await self._loader.load(slot.name, folder)
            await self._check_answers(slot, adapter)
        except Exception as error:  # noqa: BLE001 - it is raised in the tasks that wait
            del self._slots[slot.pin]
            slot.ready.set_exception(error)
            slot.ready.exception()  # marks it as retrieved: every caller may have left
        else:
            slot.ready.set_result(adapter)
        async with self._changed:
            self._changed.notify_all()

    async def _check_answers(self, slot: Slot, adapter: Any) -> None:
        """Raises AdapterError if the adapter fails its check; it is then unloaded."""
        if not self._check:
            return
        try:
            await self._check(slot.name, slot.pin, await self._loader.probe(adapter))
        except BaseException:
            await self._loader.unload(adapter)
            raise

    async def _unload(self, slot: Slot) -> None:
        try:
            await self._loader.unload(slot.adapter)
        except Exception:
            log.exception("failed to unload the adapter %s", slot.name)
        del self._slots[slot.pin]
        async with self._changed:
            self._changed.notify_all()

"""An engine's adapters: loads one when a request needs it, unloads the least recently used, never one in use.

In the engine's process; how an adapter gets into the engine is its kind's business (`Loader`). Standard library only.
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
# Adapters that are brought at once; a store that hangs must not be asked by everybody.
BRINGS = 16
# So long those that are in use may keep others out, and so long one waits for a place at all.
PATIENCE_S, WAIT_S = 2.0, 30.0


class AdapterError(Exception):
    """An adapter that cannot be used; `status` is HTTP's."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclass(eq=False)
class Slot:
    """One adapter in the engine, or on its way there."""

    name: str
    pin: str
    ready: asyncio.Future[Any]
    users: int = 0
    leaving: bool = False
    """It gets no new users; it is unloaded when it has none."""

    @property
    def adapter(self) -> Any:
        """What was loaded; None while it is under way, or if it failed."""
        return self.ready.result() if self.ready.done() and not self.ready.exception() else None


Bring = Callable[[str, str], Awaitable[Path]]
Check = Callable[[str, str, list[TokenLogprobs]], Awaitable[None]]


class AdapterSlots:
    """At most `most` at once.

    `bring`: from a name and a pin to a folder; raises AdapterError. `check`, if there is one, gets name, pin and what
    was probed after each load, and raises AdapterError.
    """

    def __init__(self, loader: Loader, most: int, bring: Bring, check: Check | None = None) -> None:
        self._loader = loader
        self._most = most
        self._bring = bring
        self._check = check
        self._slots: dict[str, Slot] = {}
        """By pin, the least recently used first."""
        self._changed = asyncio.Condition()
        self._coming: dict[str, asyncio.Task[Path]] = {}
        self._turns = asyncio.Semaphore(BRINGS)
        self._tasks: set[asyncio.Task[None]] = set()

    def loaded(self) -> list[str]:
        """The pins of those that can be used at once."""
        return [pin for pin, slot in self._slots.items() if slot.adapter and not slot.leaving]

    @contextlib.asynccontextmanager
    async def using(self, name: str, pin: str) -> AsyncIterator[None]:
        """Have that adapter in the engine meanwhile, for the requests of this task. Raises AdapterError."""
        slot = await self._take(name, pin)
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

    async def _take(self, name: str, pin: str) -> Slot:
        """The adapter's slot, with one user more. Raises AdapterError.

        1. One that is there, or on its way into the engine, is shared.
        2. Its files are brought, which takes no slot: a store that is slow or away costs those that are loaded nothing.
        3. Where there is room, it is loaded.
        4. Else the least recently used that nobody uses makes room, and one waits until it has.
        5. Where all are in use for PATIENCE_S, the least recently used gets no new users, and goes after its last.
        """
        loop = asyncio.get_running_loop()
        # 1.
        if slot := self._shared(pin):
            return slot
        # 2.
        folder = await self._brought(name, pin)
        began = loop.time()
        async with self._changed:
            while True:
                if slot := self._shared(pin):
                    return slot
                waited = loop.time() - began
                # 3.
                if pin not in self._slots and len(self._slots) < self._most:
                    self._slots[pin] = slot = Slot(name, pin, loop.create_future(), users=1)
                    self._start(self._load(slot, folder))
                    return slot
                if waited >= WAIT_S:
                    text = f"all {self._most} places for adapters are in use after {WAIT_S:g} s (max_loaded)"
                    raise AdapterError(text, 503)
                others = [other for other in self._slots.values() if other.adapter]
                leaving = [other for other in others if other.leaving]
                idle = next((other for other in others if not other.users), None)
                # 4.
                if idle and not idle.leaving:
                    self._leave(idle)
                # 5.
                elif others and not leaving and waited >= PATIENCE_S:
                    self._leave(others[0])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout((PATIENCE_S if waited < PATIENCE_S else WAIT_S) - waited):
                        await self._changed.wait()

    def _shared(self, pin: str) -> Slot | None:
        """The slot of one that is there and stays, with one user more."""
        slot = self._slots.get(pin)
        if not slot or slot.leaving:
            return None
        self._slots[pin] = self._slots.pop(pin)
        slot.users += 1
        return slot

    def _leave(self, slot: Slot) -> None:
        """It gets no new users; without any, it is unloaded now."""
        slot.leaving = True
        if not slot.users:
            self._start(self._unload(slot))

    async def _brought(self, name: str, pin: str) -> Path:
        """Its folder, brought once for all who ask. Raises AdapterError."""
        task = self._coming.get(pin)
        if not task:
            work = self._bring_in_turn(name, pin)
            task = self._coming[pin] = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
            task.add_done_callback(lambda done: self._arrived(pin, done))
        return await asyncio.shield(task)

    def _arrived(self, pin: str, task: asyncio.Task[Path]) -> None:
        del self._coming[pin]
        if not task.cancelled():
            task.exception()  # perhaps nobody waits any more

    async def _bring_in_turn(self, name: str, pin: str) -> Path:
        try:
            async with asyncio.timeout(WAIT_S):
                await self._turns.acquire()
        except TimeoutError:
            raise AdapterError(f"{BRINGS} others are still being brought after {WAIT_S:g} s", 503) from None
        try:
            return await self._bring(name, pin)
        finally:
            self._turns.release()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """In a task of its own: it goes on if whoever asked has left, for others may wait for it.

        And in a context of its own, so that what it asks of the engine is nobody's request.
        """
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, slot: Slot, folder: Path) -> None:
        try:
            adapter = await self._loader.load(slot.name, folder)
            await self._probe(slot, adapter)
        except Exception as error:  # noqa: BLE001 - it is raised in those who wait
            del self._slots[slot.pin]
            slot.ready.set_exception(error)
            slot.ready.exception()  # perhaps nobody waits any more
        else:
            slot.ready.set_result(adapter)
        async with self._changed:
            self._changed.notify_all()

    async def _probe(self, slot: Slot, adapter: Any) -> None:
        """Raises AdapterError if it is not what it should be; it is not in the engine then."""
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
            log.exception("the adapter %s could not be unloaded", slot.name)
        del self._slots[slot.pin]
        async with self._changed:
            self._changed.notify_all()

"""The events of one deploy, as its listeners hear them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

from llmrun.wire import Event


class Deploy:
    """The events of one deploy, for any number of listeners, each from the first one on."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.task: asyncio.Task[None] | None = None
        self._events: list[Event] = []
        self._more = asyncio.Condition()

    async def say(self, kind: str, model: str = "", text: str = "") -> None:
        """Add an event."""
        async with self._more:
            self._events.append(Event.model_validate({"kind": kind, "model": model, "text": text}))
            self._more.notify_all()

    async def events(self) -> AsyncIterator[Event]:
        """All events, those to come too, until the end."""
        seen = 0
        while True:
            async with self._more:
                while len(self._events) <= seen:
                    await self._more.wait()
            for event in self._events[seen:]:
                seen += 1
                yield event
                if event.kind == "end":
                    return

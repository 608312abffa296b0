"""Long-running operations that commands start, such as deploys. Any number of listeners receive their events."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

from sqlalchemy.exc import SQLAlchemyError

from llmrun.errors import LLMRunError, Refused
from llmrun.wire import Event, EventKind

log = logging.getLogger("llmrun.control")
KEEP_OPERATIONS = 20


class Operation:
    """One operation's events. Each listener gets all of them; of progress, only the newest is kept."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.task: asyncio.Task[None] | None = None
        self._events: list[Event] = []
        self._progress: dict[tuple[str, str], tuple[int, Event]] = {}
        """The newest progress event and its number, by model and text."""
        self._count = 0
        self._added = asyncio.Condition()

    async def emit(self, kind: EventKind, model: str = "", text: str = "", here: int = 0, total: int = 0) -> None:
        """Add an event."""
        event = Event(kind=kind, model=model, text=text, here=here, total=total)
        async with self._added:
            self._count += 1
            if kind == "progress":
                self._progress[model, text] = (self._count, event)
            else:
                self._events.append(event)
            self._added.notify_all()

    async def events(self) -> AsyncIterator[Event]:
        """Yield past and future events, until the operation ends."""
        sent, count = 0, 0
        while True:
            async with self._added:
                while self._count <= count:
                    await self._added.wait()
            progress = [event for number, event in self._progress.values() if number > count]
            count = self._count
            new = self._events[sent:]
            sent += len(new)
            for event in [*progress, *new]:
                yield event
                if event.kind == "end":
                    return


class Operations:
    """Running operations, and the last KEEP_OPERATIONS that ended."""

    def __init__(self) -> None:
        self._operations: dict[str, Operation] = {}

    def start(self, name: str, work: Callable[[Operation], Awaitable[None]]) -> Operation:
        """Start an operation. An exception from `work` becomes its `failed` event."""
        operation = Operation()
        ended = [key for key, old in self._operations.items() if old.task and old.task.done()]
        for key in ended[: max(0, len(self._operations) - KEEP_OPERATIONS + 1)]:
            del self._operations[key]
        self._operations[operation.id] = operation
        operation.task = asyncio.get_running_loop().create_task(self._run(name, operation, work))
        return operation

    def running(self) -> bool:
        """Whether any operation is running."""
        return any(operation.task and not operation.task.done() for operation in self._operations.values())

    def find(self, operation_id: str) -> Operation:
        """Return an operation by its id. Raises Refused if it is unknown."""
        if operation_id not in self._operations:
            text = f"operation {operation_id} not found: control may have restarted. Run the command again"
            raise Refused(text, 404)
        return self._operations[operation_id]

    async def _run(self, name: str, operation: Operation, work: Callable[[Operation], Awaitable[None]]) -> None:
        try:
            await work(operation)
        except LLMRunError as error:
            await operation.emit("failed", text=str(error))
        except SQLAlchemyError as error:
            log.exception("%s (operation %s) failed", name, operation.id)
            await operation.emit("failed", text=f"database error in control: {str(error).splitlines()[0]}")
        except Exception as error:
            log.exception("%s (operation %s) failed", name, operation.id)
            await operation.emit("failed", text=f"internal error in control: {type(error).__name__}: {error}")
        finally:
            await operation.emit("end")

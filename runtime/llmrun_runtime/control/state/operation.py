"""Long-running operations that commands start, such as deploys. Any number of listeners receive their events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from sqlalchemy.exc import SQLAlchemyError

from llmrun.errors import LLMRunError, Refused
from llmrun.wire import Event, EventKind, OperationState
from llmrun_runtime.control.state.connection import describe_error

log = logging.getLogger("llmrun.control")
KEEP_OPERATIONS = 20


class Operation:
    """One operation's events. Each listener gets all of them; of progress, only the newest is kept."""

    def __init__(self, app: str = "", by: str = "") -> None:
        self.id = uuid.uuid4().hex[:12]
        self.app = app
        """The app of a deploy; "" for other operations."""
        self.by = by
        """Who started it, according to the client."""
        self.state: OperationState = "running"
        self.started = time.time()
        self.ended = 0.0
        self.task: asyncio.Task[None] | None = None
        self._cancelled_by = ""
        self._uninterrupted = True  # until it has begun
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

    @property
    def last(self) -> str:
        """The newest event except progress: the current step, or the result."""
        event = next((event for event in reversed(self._events) if event.kind != "end"), None)
        return (f"{event.model}: {event.text or event.kind}" if event.model else event.text) if event else ""

    def cancel(self, by: str) -> None:
        """Have the operation undo what it has not finished, and end. Raises Refused if it has ended."""
        if self.state != "running":
            raise Refused(f"cannot cancel {self.id}: it has ended ({self.state})", 409)
        if not self._cancelled_by:
            self._cancelled_by = by
            if self.task and not self._uninterrupted:
                self.task.cancel()

    @contextlib.contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Let a block finish before the operation is cancelled."""
        pending, self._uninterrupted = not self._cancelled_by, True
        try:
            yield
        finally:
            self._uninterrupted = False
            if pending and self._cancelled_by:
                raise asyncio.CancelledError

    async def run(self, name: str, work: Callable[[Operation], Awaitable[None]]) -> None:
        """Do the work. Its exception becomes the `failed` event."""
        error = ""
        try:
            self._uninterrupted = False
            if self._cancelled_by:
                raise asyncio.CancelledError
            await work(self)
        except asyncio.CancelledError:
            if not self._cancelled_by:
                raise
            error = f"cancelled by {self._cancelled_by}"
            self.state = "cancelled"
        except LLMRunError as failure:
            error = str(failure)
        except SQLAlchemyError as failure:
            log.exception("%s (operation %s) failed", name, self.id)
            error = describe_error(failure)
        except Exception as failure:
            log.exception("%s (operation %s) failed", name, self.id)
            error = f"internal error in control: {type(failure).__name__}: {failure}"
        finally:
            failed = error or any(event.kind == "failed" for event in self._events)
            if self.state == "running":
                self.state = "failed" if failed else "finished"
            self.ended = time.time()
            if error:
                await self.emit("failed", text=error)
            await self.emit("end")

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

    def start(
        self, name: str, work: Callable[[Operation], Awaitable[None]], *, app: str = "", by: str = ""
    ) -> Operation:
        """Start an operation; a deploy names its app. An exception from `work` becomes its `failed` event."""
        operation = Operation(app, by)
        ended = [key for key, old in self._operations.items() if old.ended]
        for key in ended[: max(0, len(self._operations) - KEEP_OPERATIONS + 1)]:
            del self._operations[key]
        self._operations[operation.id] = operation
        operation.task = asyncio.get_running_loop().create_task(operation.run(name, work))
        return operation

    def running(self) -> bool:
        """Whether any operation is running."""
        return any(not operation.ended for operation in self._operations.values())

    def deploys(self) -> list[Operation]:
        """Return the deploys, the newest first."""
        return [operation for operation in reversed(self._operations.values()) if operation.app]

    def find(self, operation_id: str) -> Operation:
        """Return an operation by its id. Raises Refused if it is unknown."""
        if operation_id not in self._operations:
            text = f"operation {operation_id} not found: control may have restarted. Run the command again"
            raise Refused(text, 404)
        return self._operations[operation_id]

    def find_deploy(self, operation_id: str) -> Operation:
        """Return a deploy by its id. Raises Refused if it is unknown, or another kind of operation."""
        operation = self._operations.get(operation_id)
        if not operation or not operation.app:
            raise Refused(f"deploy {operation_id!r} not found: `llmrun deploy list` shows all", 404)
        return operation

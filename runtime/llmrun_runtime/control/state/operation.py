"""Jobs: deploys, and errands for weights. What happens in one is heard by any number of listeners."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

from llmrun.errors import LLMRunError, Refused
from llmrun.wire import Event

log = logging.getLogger("llmrun.control")
KEEP_OPERATIONS = 20


class Operation:
    """The events of one job, for each listener from the first one on. Of progress only the newest is kept."""

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.task: asyncio.Task[None] | None = None
        self._events: list[Event] = []
        self._progress: dict[tuple[str, str], tuple[int, Event]] = {}
        self._number = 0
        self._more = asyncio.Condition()

    async def say(self, kind: str, model: str = "", text: str = "", here: int = 0, total: int = 0) -> None:
        """Add an event."""
        said = {"kind": kind, "model": model, "text": text, "here": here, "total": total}
        event = Event.model_validate(said)
        async with self._more:
            self._number += 1
            if kind == "progress":
                self._progress[model, text] = (self._number, event)
            else:
                self._events.append(event)
            self._more.notify_all()

    async def events(self) -> AsyncIterator[Event]:
        """All events, those to come too, until the end."""
        seen, number = 0, 0
        while True:
            async with self._more:
                while self._number <= number:
                    await self._more.wait()
            moved = [event for at, event in self._progress.values() if at > number]
            number = self._number
            new = self._events[seen:]
            seen += len(new)
            for event in [*moved, *new]:
                yield event
                if event.kind == "end":
                    return


class Operations:
    """The jobs that run and the last ones that did."""

    def __init__(self) -> None:
        self._jobs: dict[str, Operation] = {}

    def start(self, what: str, work: Callable[[Operation], Awaitable[None]]) -> Operation:
        """Begin a job. What `work` raises is its last event before the end."""
        job = Operation()
        ended = [key for key, old in self._jobs.items() if old.task and old.task.done()]
        for key in ended[: max(0, len(self._jobs) - KEEP_OPERATIONS + 1)]:
            del self._jobs[key]
        self._jobs[job.id] = job
        job.task = asyncio.get_running_loop().create_task(self._run(what, job, work))
        return job

    def running(self) -> bool:
        """Whether any job has not ended."""
        return any(job.task and not job.task.done() for job in self._jobs.values())

    def find(self, job_id: str) -> Operation:
        """A job by its id. Raises Refused."""
        if job_id not in self._jobs:
            raise Refused(f"there is no job {job_id}: control may have been restarted; run the command again", 404)
        return self._jobs[job_id]

    async def _run(self, what: str, job: Operation, work: Callable[[Operation], Awaitable[None]]) -> None:
        try:
            await work(job)
        except LLMRunError as error:
            await job.say("failed", text=str(error))
        except Exception as error:
            log.exception("%s (job %s) failed", what, job.id)
            await job.say("failed", text=f"control failed: {type(error).__name__}: {error}")
        finally:
            await job.say("end")

"""A node agent's weights workers: start them, send them tasks, and keep idle ones for a while."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from llmrun.errors import NotFound, WeightsError
from llmrun_runtime.weights.tasks import FetchTask, ListAdaptersTask, PinTask, Task

# Saves half a second of imports: the worker that pinned a source can fetch it once the user confirms, and the worker
# that lists adapters once per minute serves their downloads.
IDLE_S = 75
MAX_LINE_BYTES = 2**26
MAX_WORKERS = 4
# Tasks that can take hours leave a worker to the others: listings, and downloads of at most SMALL_BYTES.
MAX_LONG_TASKS = MAX_WORKERS - 1
SMALL_BYTES = 2**30


class WorkerPool:
    """At most MAX_WORKERS processes, one environment each. `where`: the node's name in errors."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._idle: dict[asyncio.subprocess.Process, tuple[dict[str, str], asyncio.TimerHandle]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(MAX_WORKERS)
        self._long_slots = asyncio.Semaphore(MAX_LONG_TASKS)
        self._busy = 0
        """The slots that are taken."""

    async def run(self, task: Task, env: Mapping[str, str], progress: Callable[[int, int], None]) -> Any:
        """Run a task in a worker with that environment, once one is free; return its result. Raises WeightsError."""
        async with contextlib.AsyncExitStack() as slot:
            if _is_long(task):
                await slot.enter_async_context(self._long_slots)
            await slot.enter_async_context(self._slots)
            self._busy += 1
            slot.callback(self._count_free)
            process = await self._acquire(dict(env))
            try:
                result = await self._exchange(process, task, progress)
            except BaseException:
                self._kill(process)
                raise
            # The worker may still sync to disk; the caller does not wait for that.
            self._spawn(self._release(process, dict(env), slot.pop_all()))
            return result

    def _count_free(self) -> None:
        self._busy -= 1

    async def close(self) -> None:
        """Let busy workers finish, and end all workers."""
        await asyncio.gather(*self._background, return_exceptions=True)
        for process in list(self._idle):
            self._kill(process)
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _acquire(self, env: dict[str, str]) -> asyncio.subprocess.Process:
        for process, (process_env, timer) in self._idle.items():
            if process_env == env and process.returncode is None:
                timer.cancel()
                del self._idle[process]
                return process
        if self._busy + len(self._idle) > MAX_WORKERS:
            self._kill(next(iter(self._idle)))
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "llmrun_runtime.weights.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=env or None,
            limit=MAX_LINE_BYTES,
        )

    async def _exchange(
        self, process: asyncio.subprocess.Process, task: Task, progress: Callable[[int, int], None]
    ) -> Any:
        """Send a task and return its result. Raises WeightsError."""
        assert process.stdin and process.stdout
        with contextlib.suppress(ConnectionError):  # the worker has died: its output ends below
            process.stdin.write(task.model_dump_json().encode() + b"\n")
            await process.stdin.drain()
        async for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                kind = NotFound if message.get("not_found") else WeightsError
                raise kind(f"{message['error']} (on {self._where})")
            if "result" in message:
                return message["result"]
            progress(message["complete"], message["total"])
        code = await process.wait()
        raise WeightsError(f"the weights worker on {self._where} ended with exit code {code}: try again")

    async def _release(
        self, process: asyncio.subprocess.Process, env: dict[str, str], slot: contextlib.AsyncExitStack
    ) -> None:
        """Wait until the worker is idle, free its slot, and keep it for IDLE_S."""
        assert process.stdout
        async with slot:
            if not await process.stdout.readline():
                self._kill(process)
                return
            self._idle[process] = env, asyncio.get_running_loop().call_later(IDLE_S, self._kill, process)

    def _kill(self, process: asyncio.subprocess.Process) -> None:
        if process in self._idle:
            self._idle.pop(process)[1].cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        self._spawn(_reap(process))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task and keep a reference, as asyncio does not."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _is_long(task: Task) -> bool:
    match task:
        case PinTask() | ListAdaptersTask():
            return False
        case FetchTask():
            return task.pin.total > SMALL_BYTES
        case _:
            return True


async def _reap(process: asyncio.subprocess.Process) -> None:
    await process.wait()
    assert process.stdin
    process.stdin.close()

"""A node agent's workers: starts them, sends them errands, keeps one for a while that may be needed again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from llmrun.errors import NotFound, WeightsError
from llmrun_runtime.weights.worker import WorkerTask

# A pin's worker is there for the transfer that follows a person's yes, and one that lists adapters, once a minute, for
# those that are asked for: half a second of imports less.
IDLE_S = 75
LINE_BYTES = 2**26


class WorkerPool:
    """Worker processes, by their environments. `where` names the node in errors."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._idle: dict[asyncio.subprocess.Process, tuple[dict[str, str], asyncio.TimerHandle]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def send(self, errand: WorkerTask, env: Mapping[str, str], progress: Callable[[int, int], None]) -> Any:
        """Have a worker with that environment do it; its result as soon as it is said. Raises WeightsError."""
        process = await self._take(dict(env))
        try:
            result = await self._hear(process, errand, progress)
        except BaseException:
            self._end(process)
            raise
        # What it still does, waiting for the disk, nobody waits for.
        self._later(self._keep(process, dict(env)))
        return result

    async def close(self) -> None:
        """Let those that work end what they do, and end all."""
        await asyncio.gather(*self._ending, return_exceptions=True)
        for process in list(self._idle):
            self._end(process)
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _take(self, env: dict[str, str]) -> asyncio.subprocess.Process:
        for process, (theirs, timer) in self._idle.items():
            if theirs == env and process.returncode is None:
                timer.cancel()
                del self._idle[process]
                return process
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llmrun_runtime.weights.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=env or None,
            limit=LINE_BYTES,
        )

    async def _hear(
        self, process: asyncio.subprocess.Process, errand: WorkerTask, progress: Callable[[int, int], None]
    ) -> Any:
        assert process.stdin and process.stdout
        with contextlib.suppress(ConnectionError):  # it has died: that it says nothing tells
            process.stdin.write(errand.model_dump_json().encode() + b"\n")
            await process.stdin.drain()
        async for line in process.stdout:
            message = json.loads(line)
            if "error" in message:
                kind = NotFound if message.get("missing") else WeightsError
                raise kind(f"{message['error']} (on {self._where})")
            if "result" in message:
                return message["result"]
            progress(message["here"], message["total"])
        code = await process.wait()
        raise WeightsError(f"the work on weights ended with exit code {code} on {self._where}: run it again")

    async def _keep(self, process: asyncio.subprocess.Process, env: dict[str, str]) -> None:
        """When it is free, keep it for IDLE_S."""
        assert process.stdout
        if not await process.stdout.readline():
            self._end(process)
            return
        self._idle[process] = env, asyncio.get_running_loop().call_later(IDLE_S, self._end, process)

    def _end(self, process: asyncio.subprocess.Process) -> None:
        if process in self._idle:
            self._idle.pop(process)[1].cancel()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        self._later(_reap(process))

    def _later(self, work: Any) -> None:
        """Do it in a task, and keep a reference, as asyncio does not."""
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _reap(process: asyncio.subprocess.Process) -> None:
    await process.wait()
    assert process.stdin
    process.stdin.close()

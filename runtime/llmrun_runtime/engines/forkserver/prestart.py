"""A head start: the node agent begins an engine while the replica that will own it is still on its way.

Serve takes half a second to bring a replica, which is what a forked engine takes to be ready. The replica asks the
agent's Unix socket, and gets the engine with its lease. One that no replica takes is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path

from llmrun.errors import EngineError
from llmrun_runtime.engines.base import Engine, Launch
from llmrun_runtime.engines.process.child import ForkRefused
from llmrun_runtime.engines.process.fork import FORK_TIMEOUT_S
from llmrun_runtime.engines.process.start import StartedProcess, start_process
from llmrun_runtime.engines.process.unix_sockets import listen_at, short_name

log = logging.getLogger("ray.serve")
# A replica without a spare worker takes 3 s on 2 cores.
WAIT_S = 15.0
ANSWER_S = 2.0


def prestart_socket(root: Path, node: str) -> Path:
    """Where replicas of this node ask whether their engine has been begun."""
    return root / "warm" / f"begun-{node[:12]}.sock"


class Prestarts:
    """The agent's side. A key names a version of a model; there is one engine for each at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = listen_at(path)
        self._listener.setblocking(False)
        self._begun: dict[str, asyncio.Task[StartedProcess]] = {}
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    def start(self, key: str, engine: Engine, launch: Launch) -> None:
        """Begin an engine, if none waits for a replica already."""
        if key not in self._begun:
            loop = asyncio.get_running_loop()
            self._begun[key] = task = loop.create_task(start_process(engine, launch, spawn=False))
            loop.call_later(WAIT_S, self._give_up, key, task)

    async def close(self) -> None:
        """End those that no replica has taken."""
        self._serving.cancel()
        await asyncio.gather(self._serving, *self._begun.values(), return_exceptions=True)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for key, task in list(self._begun.items()):
            self._give_up(key, task)

    def _give_up(self, key: str, task: asyncio.Task[StartedProcess]) -> None:
        if self._begun.get(key) is not task:
            return
        del self._begun[key]
        task.cancel()  # nothing for one that is done
        if not task.cancelled() and task.done() and not task.exception():
            log.warning("no replica came for the engine that was begun for %s", key)
            task.result().abandon()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        answers: set[asyncio.Task[None]] = set()
        while True:
            caller, _ = await loop.sock_accept(self._listener)
            task = loop.create_task(self._answer(caller))
            answers.add(task)
            task.add_done_callback(answers.discard)

    async def _answer(self, caller: socket.socket) -> None:
        """Give the caller what was begun for it, as soon as it has been forked; hang up if there is nothing."""
        with caller:
            caller.setblocking(False)
            try:
                async with asyncio.timeout(ANSWER_S):
                    key = (await asyncio.get_running_loop().sock_recv(caller, 4096)).decode()
                task = self._begun.pop(key, None)
                begun = await task if task else None
            except (OSError, ValueError, TimeoutError, ForkRefused, EngineError) as error:
                log.info("no head start: %s", error)
                return
            if begun:
                try:
                    begun.hand_to(caller)
                except OSError:  # the replica has gone
                    await asyncio.to_thread(begun.abandon)


def adopt(path: Path, key: str) -> StartedProcess | None:
    """The replica's side: its engine, if one was begun. Blocks."""
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as caller, short_name(path) as name:
        caller.settimeout(FORK_TIMEOUT_S)
        caller.connect(name)
        caller.sendall(key.encode())
        return StartedProcess.taken_from(caller)
    return None

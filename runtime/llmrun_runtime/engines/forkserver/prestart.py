"""Prestart: the node agent starts an engine before the replica that will own it has started.

Serve takes half a second to start a replica; a forked engine needs as long to become ready. The replica connects to
the agent's Unix socket and receives the engine with its lease. An engine that no replica takes over is killed.
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
from llmrun_runtime.engines.process.unix_sockets import listen_at, short_path

log = logging.getLogger("ray.serve")
# A replica without a spare worker needs 3 s on 2 cores.
ADOPT_TIMEOUT_S = 15.0
REQUEST_TIMEOUT_S = 2.0


def prestart_socket(root: Path, node: str) -> Path:
    """Return the path of the socket on which a node agent passes on prestarted engines."""
    return root / "forkserver" / f"prestart-{node[:12]}.sock"


class Prestarts:
    """The agent's side. A key identifies a version of a model; each has at most one prestarted engine at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener = listen_at(path)
        self._listener.setblocking(False)
        self._started: dict[str, asyncio.Task[StartedProcess]] = {}
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    def start(self, key: str, engine: Engine, launch: Launch) -> None:
        """Start an engine, unless one is already waiting for its replica."""
        if key not in self._started:
            loop = asyncio.get_running_loop()
            self._started[key] = task = loop.create_task(start_process(engine, launch, spawn=False))
            loop.call_later(ADOPT_TIMEOUT_S, self._discard, key, task)

    async def close(self) -> None:
        """Kill the engines that no replica has taken over."""
        self._serving.cancel()
        await asyncio.gather(self._serving, *self._started.values(), return_exceptions=True)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for key, task in list(self._started.items()):
            self._discard(key, task)

    def _discard(self, key: str, task: asyncio.Task[StartedProcess]) -> None:
        if self._started.get(key) is not task:
            return
        del self._started[key]
        task.cancel()  # no effect on a finished task
        if not task.cancelled() and task.done() and not task.exception():
            log.warning("no replica took over the engine that was prestarted for %s", key)
            asyncio.get_running_loop().run_in_executor(None, task.result().discard)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        replies: set[asyncio.Task[None]] = set()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            task = loop.create_task(self._reply(connection))
            replies.add(task)
            task.add_done_callback(replies.discard)

    async def _reply(self, connection: socket.socket) -> None:
        """Pass the engine to the replica as soon as it has been forked; close the connection if there is none."""
        with connection:
            connection.setblocking(False)
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    key = (await asyncio.get_running_loop().sock_recv(connection, 4096)).decode()
                task = self._started.pop(key, None)
                process = await task if task else None
            except (OSError, ValueError, TimeoutError, ForkRefused, EngineError) as error:
                log.info("no prestarted engine: %s", error)
                return
            if process:
                try:
                    process.send_to(connection)
                except OSError:  # the replica has closed the connection
                    await asyncio.to_thread(process.discard)


def adopt(path: Path, key: str) -> StartedProcess | None:
    """Take over the replica's engine from the node agent, if one was prestarted. Blocks."""
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as agent, short_path(path) as name:
        agent.settimeout(FORK_TIMEOUT_S)
        agent.connect(name)
        agent.sendall(key.encode())
        return StartedProcess.receive_from(agent)
    return None

"""Keeps a node's warm parent: holds the socket that replicas ask it by, starts it, and another when it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from llmrun_runtime.engines.base import Engine
from llmrun_runtime.engines.forkserver.server import LD_PRELOAD_BEFORE
from llmrun_runtime.engines.process.start import preloading
from llmrun_runtime.engines.process.unix_sockets import listen_at

log = logging.getLogger("ray.serve")
# One that ends sooner than this has failed: engines start plainly until the pause is over.
SHORT_LIFE_S = 60.0
PAUSE_S, MOST_PAUSE_S = 5.0, 300.0


def forkserver_socket(root: Path, node: str, engine: str) -> Path:
    """Where replicas of this node ask its warm parent."""
    return root / "warm" / f"{engine}-{node[:12]}.sock"


class ForkServerSupervisor:
    """One engine's warm parent. `env` is what engines have before their models' own variables."""

    def __init__(self, engine: Engine, path: Path, output: Path, env: Mapping[str, str]) -> None:
        self._engine = engine
        self._path = path
        self._output = output
        self._env = {**env, **engine.environment(env, None)}
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen, so that replicas can ask from now on, and keep a parent. Nothing if it is kept already."""
        if self._task is None or self._task.done():
            self._listen()
            self._task = asyncio.get_running_loop().create_task(self._keep())

    async def close(self) -> None:
        """End the parent; engines that it forked live on."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._deafen()

    def _listen(self) -> None:
        self._listener = self._listener or listen_at(self._path)

    def _deafen(self) -> None:
        """Replicas that ask hear at once that there is none."""
        if self._listener:
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)

    async def _keep(self) -> None:
        pause = PAUSE_S
        while True:
            began = time.monotonic()
            await self._run()
            if time.monotonic() - began > SHORT_LIFE_S:
                pause = PAUSE_S
                continue
            log.warning("the warm parent of %s ended early: see %s", self._engine.name, self._output)
            self._deafen()
            await asyncio.sleep(pause)
            pause = min(2 * pause, MOST_PAUSE_S)
            self._listen()

    async def _run(self) -> None:
        """One parent, from its start to its end."""
        assert self._listener
        env = {**preloading(self._engine, self._env), LD_PRELOAD_BEFORE: self._env.get("LD_PRELOAD", "")}
        descriptor = self._listener.fileno()
        self._output.parent.mkdir(parents=True, exist_ok=True)
        with self._output.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(
                    sys.executable,
                    "-m",
                    "llmrun_runtime.engines.forkserver.server",
                    self._engine.module,
                    str(descriptor),
                ),
                pass_fds=[descriptor],
                stdin=asyncio.subprocess.PIPE,  # its end is the parent's
                stdout=output,
                stderr=output,
                env=env,
            )
        try:
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

"""Supervises a node's fork server: owns the socket that replicas connect to, starts the server and restarts it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from llmrun_runtime.engines.base import LOOPBACK_ONLY, Engine
from llmrun_runtime.engines.forkserver.server import LD_PRELOAD_BEFORE
from llmrun_runtime.engines.process.start import with_ld_preload
from llmrun_runtime.engines.process.unix_sockets import listen_at

log = logging.getLogger("ray.serve")
SERVER = "llmrun_runtime.engines.forkserver.server"
# A server that exits sooner, or with an error, has failed: engines start as plain processes until the back-off is over.
# Imports can take longer than this on a slow disk.
MIN_LIFE_S = 60.0
POLL_S = 5.0
BACKOFF_S, MAX_BACKOFF_S = 5.0, 300.0


def forkserver_socket(root: Path, node: str, engine: str) -> Path:
    """Return the path of the socket of a node's fork server."""
    return root / "forkserver" / f"{engine}-{node[:12]}.sock"


class ForkServerSupervisor:
    """The supervisor of one engine's fork server. `env`: the engines' environment without their models' variables.

    The server checks every `poll_s` seconds whether it must be replaced. `backoff_s`: see BACKOFF_S.
    """

    def __init__(
        self,
        engine: Engine,
        path: Path,
        output: Path,
        env: Mapping[str, str],
        *,
        poll_s: float = POLL_S,
        backoff_s: float = BACKOFF_S,
    ) -> None:
        self._engine = engine
        self._path = path
        self._output = output
        self._poll_s = poll_s
        self._backoff_s = backoff_s
        self._env = {**LOOPBACK_ONLY, **env, **engine.environment(env, None)}
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen, so that replicas can connect at once, and start the server. Do nothing if it is already running.

        Raises OSError.
        """
        if self._task is None or self._task.done():
            self._listen()
            self._task = asyncio.get_running_loop().create_task(self._supervise())

    async def close(self) -> None:
        """Stop the server; engines that it forked keep running."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._stop_listening()

    def _listen(self) -> None:
        self._listener = self._listener or listen_at(self._path)

    def _stop_listening(self) -> None:
        """Make connections from replicas fail at once."""
        if self._listener:
            self._listener.close()
            self._listener = None
            self._path.unlink(missing_ok=True)

    async def _supervise(self) -> None:
        backoff = self._backoff_s
        try:
            while True:
                started = time.monotonic()
                try:
                    self._listen()
                    code = await self._run_once()
                    cause = f"it exited with code {code}: {last_line(self._output)} (see {self._output})"
                except OSError as error:  # a full disk, or no more processes
                    code, cause = 1, str(error)
                if code <= 0 and time.monotonic() - started > MIN_LIFE_S:  # below 0: a signal, after it had served
                    backoff = self._backoff_s
                    continue
                log.warning("the fork server of %s failed, retrying in %g s: %s", self._engine.name, backoff, cause)
                self._stop_listening()
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, MAX_BACKOFF_S)
        finally:
            self._stop_listening()  # nothing would answer

    async def _run_once(self) -> int:
        """Start a server and wait until it exits; return its exit code. The output of the one before is kept beside."""
        assert self._listener
        env = {**with_ld_preload(self._engine, self._env), LD_PRELOAD_BEFORE: self._env.get("LD_PRELOAD", "")}
        descriptor = self._listener.fileno()
        self._output.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._output.replace(self._output.with_suffix(".log.1"))
        with self._output.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", SERVER, self._engine.module, str(descriptor), str(self._poll_s)),
                pass_fds=[descriptor],
                stdin=asyncio.subprocess.PIPE,  # the server exits when this closes
                stdout=output,
                stderr=output,
                env=env,
            )
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def last_line(file: Path) -> str:
    """Return the last line of a log that is not empty."""
    try:
        lines = file.read_text(errors="replace").strip().splitlines()
    except OSError:
        return "no output"
    return lines[-1] if lines else "no output"

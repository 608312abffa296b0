"""The replica's end of an engine: starts its process, holds the lease, waits until it answers, ends it.

Knows processes and sockets; nothing of Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path
from typing import IO, Any

import aiohttp
import psutil

from llmrun.errors import EngineError
from llmrun_runtime.engines.base import (
    LEASE_ENV,
    SHIM_ENV,
    STATE_PATH,
    TOKEN_ENV,
    TOKEN_HEADER,
    Engine,
    Launch,
)
from llmrun_runtime.engines.child import UNKNOWN_EXIT, Child, NotForked, Spawned, fork

log = logging.getLogger("ray.serve")
POLL_S = 0.05
LISTEN_POLL_S = 0.005  # an engine that is ready listens at once
TERM_GRACE_S = 10  # vLLM ends within 1-2 s of SIGTERM
LAST_GRACE_S = 3
STATE_TIMEOUT_S = 2  # well within control's patience for a report
LOG_TAIL_BYTES = 64 * 1024
# An engine's own temporary folder; the number after it is its replica's process.
SCRATCH = "llmrun-engine-"


class EngineProcess:
    """One engine. `start`, `ready`, then `state` as often as wanted, then `end`."""

    def __init__(self, engine: Engine, launch: Launch) -> None:
        self._engine = engine
        self._launch = launch
        self.token = secrets.token_urlsafe(32)
        self.port = 0
        self._ready = asyncio.Event()
        self._failed = ""
        self._holders: set[asyncio.StreamWriter] = set()
        self._lease: asyncio.Server | None = None
        self._child: Child | None = None
        self.forked = False
        self._session: aiohttp.ClientSession | None = None
        self._log_start = 0
        self._scratch = ""

    @property
    def pid(self) -> int:
        """The process's id; 0 before it is started."""
        return self._child.pid if self._child else 0

    async def start(self) -> None:
        """Start the process. Raises EngineError if its command cannot be run at all."""
        self._lease = await asyncio.start_server(self._serve_lease, "127.0.0.1", 0)
        host, port = self._lease.sockets[0].getsockname()[:2]
        env = {**self._launch.env, **self._engine.environment(self._launch.env, self._launch.cache)}
        env |= {LEASE_ENV: f"{host}:{port}", TOKEN_ENV: self.token, SHIM_ENV: self._launch.shim.to_json()}
        sweep_scratch()
        self._scratch = tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-")
        env["TMPDIR"] = self._scratch
        self._launch.log.parent.mkdir(parents=True, exist_ok=True)
        with self._launch.log.open("ab") as log:
            self._log_start = log.tell()
            self._child = await self._fork(env, log) or self._spawn(env, log)

    async def _fork(self, env: dict[str, str], log: IO[bytes]) -> Child | None:
        """A child of the node's warm parent; None, with a word in the log, if that cannot be used."""
        if not self._launch.warm:
            return None
        argv, title = self._engine.arguments(self._launch), f"llmrun: {self._engine.name} {self._launch.names[0]}"
        try:
            child = await asyncio.to_thread(fork, self._launch.warm, argv, env, log, title)
        except NotForked as error:
            log.write(f"[llmrun] the engine starts as a plain process: {error}\n".encode())
            log.flush()
            return None
        self.forked = True
        return child

    def _spawn(self, env: dict[str, str], log: IO[bytes]) -> Child:
        try:
            return Spawned(self._engine.command(self._launch), env, log)
        except OSError as error:
            raise EngineError(f"the engine {self._engine.name} cannot be started: {error}") from error

    async def ready(self, timeout: float) -> None:
        """Return when the engine answers. Raises EngineError with its root cause if it ends or takes too long."""
        try:
            async with asyncio.timeout(timeout):
                while not (self._ready.is_set() and self.port and await self._answers()):
                    if self._failed or self.ended():
                        raise EngineError(self.cause())
                    await self._soon()
        except TimeoutError:
            raise EngineError(
                f"the engine did not answer within {timeout:g} s (LLMRUN_START_TIMEOUT); {self.cause()}"
            ) from None

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._child is None or self._child.poll() is not None

    def cause(self) -> str:
        """Why the engine failed, in one line, from what it said and from its log."""
        if cause := self._own_words():
            return cause
        code = self._child.poll() if self._child else None
        if code is None or code == UNKNOWN_EXIT:
            return "its log names no cause"
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"the engine was ended by {signal.Signals(-code).name}{hint}; its log names no cause"
        return f"the engine ended with exit code {code}; its log names no cause"

    def unexplained(self) -> bool:
        """Whether it ended and left no word of why: something else ended it."""
        return self.ended() and not self._own_words()

    def _own_words(self) -> str:
        if self._failed:
            return self._failed
        with self._launch.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - LOG_TAIL_BYTES))
            return self._engine.root_cause(log.read().decode(errors="replace"))

    async def state(self) -> dict[str, Any]:
        """The shim's counts. Raises EngineError if it does not answer within STATE_TIMEOUT_S."""
        try:
            async with self._http().get(self._url(STATE_PATH), headers={TOKEN_HEADER: self.token}) as answer:
                state: dict[str, Any] = await answer.json()
                return state
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"the engine does not answer: {type(error).__name__}") from error

    async def end(self) -> None:
        """End every process of the engine: ask, let go of the lease, then force."""
        child = self._child
        if child and not self.ended():
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TERM_GRACE_S):
                    while not self.ended():
                        await asyncio.sleep(POLL_S)
        if self._lease:
            self._lease.close()
        for holder in list(self._holders):
            holder.close()
        if child:
            # Its own session, so its own group: what is left of it is ours. Python's resource tracker is, for a
            # moment: it removes the shared memory of those that have ended.
            with contextlib.suppress(ProcessLookupError):
                for _ in range(int(LAST_GRACE_S / POLL_S)):
                    os.killpg(child.pid, 0)
                    await asyncio.sleep(POLL_S)
                os.killpg(child.pid, signal.SIGKILL)
            if not await asyncio.to_thread(child.wait, TERM_GRACE_S):
                log.warning("engine process %d does not end", child.pid)  # in the kernel, perhaps
            child.close()
        if self._session:
            await self._session.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    async def _soon(self) -> None:
        """Wait a moment, or until the engine says that it is ready."""
        if self._ready.is_set():
            await asyncio.sleep(LISTEN_POLL_S)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), POLL_S)

    async def _answers(self) -> bool:
        try:
            await self.state()
        except EngineError:
            return False
        return True

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=STATE_TIMEOUT_S))
        return self._session

    def _url(self, path: str) -> str:
        return f"http://{self._launch.members[0].host}:{self.port}{path}"

    async def _serve_lease(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hold one process's connection open until it or this replica ends, and hear what it says."""
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), 10) or b"{}")
            if not hmac.compare_digest(str(hello.get("token", "")), self.token):
                return
            self._holders.add(writer)
            while line := await reader.readline():
                message = json.loads(line)
                self.port = message.get("port", self.port)
                self._failed = message.get("failed", self._failed)
                if message.get("ready"):
                    self._ready.set()
        except (ValueError, OSError, TimeoutError):
            return  # not one of the engine's processes, or one that ended
        finally:
            self._holders.discard(writer)
            writer.close()


def sweep_scratch() -> None:
    """Remove the temporary folders of replicas that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        owner = folder.name.removeprefix(SCRATCH).partition("-")[0]
        if owner.isdigit() and not _lives(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

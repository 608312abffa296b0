"""A started engine process with everything that its owner holds of it. One process of a node can pass it to another.

The engine connects to the lease, whose socket already listens: the process that accepts there is the engine's replica.
If no process accepts and the listener closes, the engine exits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrun.errors import EngineError
from llmrun_runtime.engines.base import (
    CORES_ENV,
    LEASE_ENV,
    LOOPBACK_ONLY,
    SHIM_ENV,
    THREADS_ENV,
    TOKEN_ENV,
    Engine,
    Launch,
)
from llmrun_runtime.engines.process.child import Child, Forked, ForkRefused, Spawned
from llmrun_runtime.engines.process.cores import claim_cores
from llmrun_runtime.engines.process.fork import fork
from llmrun_runtime.engines.process.temp_dir import TempDir, sweep_temp_dirs
from llmrun_runtime.logs import mark_in_use


@dataclass(frozen=True)
class StartedProcess:
    """`log` receives its output, from the offset `log_start` on; `started_at` is in Unix time.

    `cores` are the CPUs that it computes on; () if llmrun did not choose them.
    """

    child: Child
    token: str
    lease: socket.socket
    temp_dir: TempDir
    log: Path
    log_start: int
    started_at: float
    cores: tuple[int, ...] = ()

    @property
    def forked(self) -> bool:
        """Whether the fork server forked it."""
        return isinstance(self.child, Forked)

    def send_to(self, connection: socket.socket) -> None:
        """Pass a forked process to the peer of a Unix socket. On OSError this process still owns it."""
        assert isinstance(self.child, Forked)
        payload = {
            "pid": self.child.pid,
            "token": self.token,
            "temp_dir": str(self.temp_dir.path),
            "log": str(self.log),
            "log_start": self.log_start,
            "started_at": self.started_at,
            "cores": self.cores,
        }
        descriptors = [self.lease.fileno(), self.temp_dir.lock, *self.child.descriptors()]
        socket.send_fds(connection, [json.dumps(payload).encode()], descriptors)
        self.lease.close()
        os.close(self.temp_dir.lock)
        self.child.close()

    @classmethod
    def receive_from(cls, connection: socket.socket) -> StartedProcess | None:
        """Receive what `send_to` sends; None if the peer has no process. Raises OSError, ValueError."""
        data, descriptors, _, _ = socket.recv_fds(connection, 65536, 4)
        if not data or not descriptors:
            return None
        payload = json.loads(data)
        lease, lock, exit_codes, pidfd = descriptors
        return cls(
            Forked(socket.socket(fileno=exit_codes), int(payload["pid"]), pidfd),
            payload["token"],
            socket.socket(fileno=lease),
            TempDir(Path(payload["temp_dir"]), lock),
            Path(payload["log"]),
            int(payload["log_start"]),
            float(payload["started_at"]),
            tuple(payload["cores"]),
        )

    def discard(self) -> None:
        """Kill a process that no replica took over, and remove its log."""
        self.lease.close()
        if self.child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
        self.child.close()
        self.temp_dir.remove()
        self.log.unlink(missing_ok=True)


def with_ld_preload(engine: Engine, env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` with the engine's shared libraries first in LD_PRELOAD."""
    libraries = ":".join(filter(None, [*engine.libraries(), env.get("LD_PRELOAD", "")]))
    return {**env, **({"LD_PRELOAD": libraries} if libraries else {})}


async def start_process(engine: Engine, launch: Launch, *, spawn: bool = True) -> StartedProcess:
    """Start an engine process: forked from the node's fork server if possible, else as a plain process.

    Raises ForkRefused if it cannot be forked and `spawn` is False; EngineError if its command cannot be run.
    """
    await asyncio.to_thread(sweep_temp_dirs)
    try:
        temp_dir = TempDir.make()
    except OSError as error:
        raise _failed(engine, error) from error
    lease, token = socket.create_server(("127.0.0.1", 0)), secrets.token_urlsafe(32)
    try:
        host, port = lease.getsockname()
        env = {**launch.env, **engine.environment(launch.env, launch.cache)}
        if len(launch.members) == 1:
            env = LOOPBACK_ONLY | env
        env |= {LEASE_ENV: f"{host}:{port}", TOKEN_ENV: token, SHIM_ENV: launch.shim.to_json()}
        env["TMPDIR"] = str(temp_dir.path)
        cores: tuple[int, ...] = ()
        if launch.gets_cores and not env.keys() & set(THREADS_ENV):
            cores = await asyncio.to_thread(claim_cores, temp_dir, launch.cpus)
            env |= {CORES_ENV: ",".join(map(str, cores))} if cores else {}
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        with launch.log.open("ab", buffering=0) as log:
            mark_in_use(log)
            log_start = log.tell()
            child: Child
            try:
                if not launch.forkserver:
                    raise ForkRefused("this node has no fork server")
                title = f"llmrun: {engine.name} {launch.names[0]}"
                child = await _fork(launch.forkserver, engine.arguments(launch), env, log, title)
            except ForkRefused as error:
                if not spawn:
                    raise
                if launch.forkserver:
                    with contextlib.suppress(OSError):  # a full disk; the log is unbuffered, so nothing stays to flush
                        log.write(f"[llmrun] starting the engine as a plain process: {error}\n".encode())
                child = Spawned(engine.command(launch), with_ld_preload(engine, env), log)
    except BaseException as error:
        lease.close()  # a process that was forked nevertheless then exits
        temp_dir.remove()
        if isinstance(error, OSError):
            raise _failed(engine, error) from error
        raise
    return StartedProcess(child, token, lease, temp_dir, launch.log, log_start, time.time(), cores)


async def _fork(*args: Any) -> Forked:
    """`fork` in a thread. If the caller is cancelled, a child that is forked later is closed."""
    forking = asyncio.ensure_future(asyncio.to_thread(fork, *args))
    try:
        return await asyncio.shield(forking)
    except asyncio.CancelledError:
        forking.add_done_callback(_close)
        raise


def _close(forking: asyncio.Future[Forked]) -> None:
    if not forking.cancelled() and not forking.exception():
        forking.result().close()


def _failed(engine: Engine, error: OSError) -> EngineError:
    return EngineError(f"engine {engine.name} failed to start: {error}")

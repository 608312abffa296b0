"""An engine's process, just begun, with all that its owner holds of it; one process of a node can hand it to another.

The engine connects to the lease, which listens already: whoever accepts there first is the engine's replica. If nobody
does and the listener closes, the engine ends.
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

from llmrun.errors import EngineError
from llmrun_runtime.engines.base import LEASE_ENV, SHIM_ENV, TOKEN_ENV, Engine, Launch
from llmrun_runtime.engines.process.child import Child, Forked, ForkRefused, Spawned
from llmrun_runtime.engines.process.fork import fork
from llmrun_runtime.engines.process.temp_dir import TempDir


@dataclass(frozen=True)
class StartedProcess:
    """`log` is where its output goes, from `log_start` on; `at` is when it was there, in unix time."""

    child: Child
    token: str
    lease: socket.socket
    scratch: TempDir
    log: Path
    log_start: int
    at: float

    @property
    def forked(self) -> bool:
        """Whether it came from a warm parent."""
        return isinstance(self.child, Forked)

    def hand_to(self, caller: socket.socket) -> None:
        """Give a forked one to the process at the other end of a Unix socket. Raises OSError: it is still ours."""
        assert isinstance(self.child, Forked)
        said = {
            "pid": self.child.pid,
            "token": self.token,
            "scratch": str(self.scratch.path),
            "log": str(self.log),
            "log_start": self.log_start,
            "at": self.at,
        }
        descriptors = [self.lease.fileno(), self.scratch.lock, *self.child.descriptors()]
        socket.send_fds(caller, [json.dumps(said).encode()], descriptors)
        self.lease.close()
        os.close(self.scratch.lock)
        self.child.close()

    @classmethod
    def taken_from(cls, caller: socket.socket) -> StartedProcess | None:
        """What `hand_to` sends; None if the other end has nothing to give. Raises OSError, ValueError."""
        data, descriptors, _, _ = socket.recv_fds(caller, 65536, 4)
        if not data or not descriptors:
            return None
        said = json.loads(data)
        lease, lock, answers, pidfd = descriptors
        return cls(
            Forked(socket.socket(fileno=answers), int(said["pid"]), pidfd),
            said["token"],
            socket.socket(fileno=lease),
            TempDir(Path(said["scratch"]), lock),
            Path(said["log"]),
            int(said["log_start"]),
            float(said["at"]),
        )

    def abandon(self) -> None:
        """End one that no replica has: at once, with its log."""
        self.lease.close()
        if self.child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
        self.child.close()
        self.scratch.remove()
        self.log.unlink(missing_ok=True)


def preloading(engine: Engine, env: Mapping[str, str]) -> dict[str, str]:
    """`env` with the engine's shared libraries in LD_PRELOAD, before those that are there."""
    libraries = ":".join(filter(None, [*engine.libraries(), env.get("LD_PRELOAD", "")]))
    return {**env, **({"LD_PRELOAD": libraries} if libraries else {})}


async def start_process(engine: Engine, launch: Launch, *, spawn: bool = True) -> StartedProcess:
    """Begin one, forked from the node's warm parent if that can be used, else as a plain process.

    Raises NotForked if it could only be a plain process and `spawn` is False; EngineError if its command cannot be run.
    """
    lease, scratch, token = socket.create_server(("127.0.0.1", 0)), TempDir.make(), secrets.token_urlsafe(32)
    host, port = lease.getsockname()
    env = {**launch.env, **engine.environment(launch.env, launch.cache)}
    env |= {LEASE_ENV: f"{host}:{port}", TOKEN_ENV: token, SHIM_ENV: launch.shim.to_json()}
    env["TMPDIR"] = str(scratch.path)
    try:
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        with launch.log.open("ab") as log:
            start = log.tell()
            child: Child
            try:
                if not launch.warm:
                    raise ForkRefused("there is no warm parent")
                title = f"llmrun: {engine.name} {launch.names[0]}"
                child = await asyncio.to_thread(fork, launch.warm, engine.arguments(launch), env, log, title)
            except ForkRefused as error:
                if not spawn:
                    raise
                if launch.warm:
                    log.write(f"[llmrun] the engine starts as a plain process: {error}\n".encode())
                    log.flush()
                child = Spawned(engine.command(launch), preloading(engine, env), log)
    except BaseException as error:
        lease.close()  # a process that was forked all the same ends
        scratch.remove()
        if isinstance(error, OSError):
            raise EngineError(f"the engine {engine.name} cannot be started: {error}") from error
        raise
    return StartedProcess(child, token, lease, scratch, launch.log, start, time.time())

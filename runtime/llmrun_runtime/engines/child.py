"""A process that a replica started or had forked: its id, its end, its exit code. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

# The node agent's socket queues requests while a warm parent imports (13 s on 2 cores), which a plain start would too.
FORK_TIMEOUT_S = 60.0
# Of a forked process whose parent is gone nobody knows it.
UNKNOWN_EXIT = 1 << 16
BACKLOG = 128


class NotForked(Exception):
    """The warm parent cannot be used; the text says why."""


class Child(Protocol):
    """What a replica does with the process of its engine. It leads a session and a process group of its own."""

    pid: int

    def poll(self) -> int | None:
        """The exit code (minus the signal), UNKNOWN_EXIT, or None while it runs."""
        ...

    def send_signal(self, number: int) -> None:
        """Nothing for one that has ended."""
        ...

    def wait(self, timeout: float) -> bool:
        """Whether it has ended within `timeout` seconds."""
        ...

    def close(self) -> None:
        """Let go of what describes it."""
        ...


class Spawned:
    """A plain child of this process. Raises OSError if the command cannot be run."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], output: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """See Child."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """See Child."""
        self._process.send_signal(number)

    def wait(self, timeout: float) -> bool:
        """See Child."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """See Child."""


class Forked:
    """A child of the node's warm parent, held by a pidfd: its number cannot mean another process."""

    def __init__(self, caller: socket.socket, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._caller = caller
        self._pidfd = pidfd
        self._exit: int | None = None
        caller.settimeout(0.5)

    def poll(self) -> int | None:
        """See Child."""
        if self._exit is None and self._pidfd >= 0 and select.select([self._pidfd], [], [], 0)[0]:
            self._exit = UNKNOWN_EXIT
            with contextlib.suppress(OSError, ValueError):  # the warm parent may be gone
                self._exit = int(json.loads(self._caller.makefile().readline())["exit"])
        return self._exit

    def send_signal(self, number: int) -> None:
        """See Child."""
        if self._exit is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.Signals(number))

    def wait(self, timeout: float) -> bool:
        """See Child."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._pidfd], [], [], left)[0]:
                return False
        return True

    def descriptors(self) -> list[int]:
        """What another process needs to hold it too: where its exit code will be told, and its pidfd."""
        return [self._caller.fileno(), self._pidfd]

    def close(self) -> None:
        """See Child."""
        self._caller.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def fork(warm: Path, argv: Sequence[str], env: Mapping[str, str], output: IO[bytes], title: str) -> Forked:
    """Have the warm parent behind the socket `warm` fork an engine, `title` in `ps`. Blocks. Raises NotForked."""
    request = json.dumps({"argv": list(argv), "env": dict(env), "title": title}).encode() + b"\n"
    caller = socket.socket(socket.AF_UNIX)
    pidfds: list[int] = []
    try:
        caller.settimeout(FORK_TIMEOUT_S)
        with short_name(warm) as name:
            caller.connect(name)
        sent = socket.send_fds(caller, [request], [output.fileno()])
        caller.sendall(request[sent:])
        data, pidfds, _, _ = socket.recv_fds(caller, 65536, 1)
        answer: dict[str, Any] = json.loads(data or b'{"refused": "it ended"}')
        if "pid" not in answer:
            raise NotForked(str(answer.get("refused")))
        return Forked(caller, int(answer["pid"]), pidfds[0])
    except (OSError, ValueError, LookupError, NotForked) as error:
        caller.close()
        for pidfd in pidfds:
            os.close(pidfd)
        if isinstance(error, NotForked):
            raise
        raise NotForked(f"{type(error).__name__}: {error}") from error


def listen_at(path: Path) -> socket.socket:
    """A listening Unix socket for this user alone; those beside it that nobody listens on any more are removed."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(path.parent)
    listener = socket.socket(socket.AF_UNIX)
    with short_name(path) as name:
        listener.bind(name)
    path.chmod(0o600)
    listener.listen(BACKLOG)
    return listener


def listens(warm: Path) -> bool:
    """Whether anybody listens at the socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as caller, short_name(warm) as name:
        caller.settimeout(1)
        caller.connect(name)
        return True
    return False


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name of at most 107 bytes, as Unix sockets need, for a path of any length. Raises OSError."""
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _sweep(folder: Path) -> None:
    """Remove the sockets that nobody listens on any more."""
    for path in folder.glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as caller, short_name(path) as name:
            caller.settimeout(1)
            try:
                caller.connect(name)
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue  # somebody's, who is busy

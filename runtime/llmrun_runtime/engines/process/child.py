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
from collections.abc import Mapping, Sequence
from typing import IO, Protocol

# Of a forked process whose parent is gone nobody knows it.
UNKNOWN_EXIT = 1 << 16


class ForkRefused(Exception):
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

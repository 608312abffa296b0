"""Engine processes as their owner handles them: process id, signals, exit code. Standard library only."""

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

# The exit code of a forked process is unknown once its fork server has exited.
UNKNOWN_EXIT = 1 << 16


class ForkRefused(Exception):
    """The fork server cannot be used; the text explains why."""


class Child(Protocol):
    """An engine's process. It leads its own session and process group."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit code (minus the signal), UNKNOWN_EXIT, or None while it runs."""
        ...

    def send_signal(self, number: int) -> None:
        """Send a signal; do nothing if the process has exited."""
        ...

    def wait(self, timeout: float) -> bool:
        """Return whether the process exited within `timeout` seconds."""
        ...

    def close(self) -> None:
        """Close the descriptors that refer to the process."""
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
    """A child of the node's fork server. A pidfd refers to it, so its number cannot mean another process."""

    def __init__(self, connection: socket.socket, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._connection = connection
        self._pidfd = pidfd
        self._exit: int | None = None
        connection.settimeout(0.5)

    def poll(self) -> int | None:
        """See Child."""
        if self._exit is None and self._pidfd >= 0 and select.select([self._pidfd], [], [], 0)[0]:
            self._exit = UNKNOWN_EXIT
            with contextlib.suppress(OSError, ValueError):  # the fork server may have exited
                self._exit = int(json.loads(self._connection.makefile().readline())["exit"])
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
        """Return what another process needs to own it: the socket that delivers its exit code, and its pidfd."""
        return [self._connection.fileno(), self._pidfd]

    def close(self) -> None:
        """See Child."""
        self._connection.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

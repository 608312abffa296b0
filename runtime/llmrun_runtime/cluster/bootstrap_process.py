"""Runs `llmrun_runtime.cluster.bootstrap` in a process of its own and reads its result. Imports no Ray."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmrun.errors import ClusterError
from llmrun.settings import Settings

TIMEOUT_S = 120
POLL_S = 0.1


def run_bootstrap(
    action: str,
    env: dict[str, str],
    args: list[str],
    log: Path,
    timeout: float = TIMEOUT_S,
    on_waiting: Callable[[int], None] = lambda requests: None,
) -> None:
    """Run the bootstrap process to its end. Calls `on_waiting` with requests in flight. Raises ClusterError."""
    process = BootstrapProcess(action, env, args, log)
    try:
        process.finish(timeout, on_waiting)
    finally:
        process.end()


class BootstrapProcess:
    """A bootstrap process. With `--stay` it connects to Ray only in `finish`, and continues to run after it."""

    def __init__(self, action: str, env: dict[str, str], args: list[str], log: Path) -> None:
        command = [sys.executable, "-P", "-m", "llmrun_runtime.cluster.bootstrap", action, *args]
        # Ray's workers import from the current directory of their driver, so it is one of llmrun.
        env = env | {"LLMRUN_HOME": str(Settings().root)}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                env=env,
                cwd=log.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._log = log
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def finish(self, timeout: float = TIMEOUT_S, on_waiting: Callable[[int], None] = lambda requests: None) -> None:
        """Let the process begin and wait for its result. Raises ClusterError."""
        self._send("")
        for event in self.events(timeout):
            if "waiting" in event:
                on_waiting(event["waiting"])
            elif "error" in event:
                raise ClusterError(event["error"])
            else:
                return
        if self._process.poll() is None:
            raise ClusterError(f"the cluster did not respond within {timeout:g} s: see {self._log}")
        raise ClusterError(f"the bootstrap process failed: see {self._log}")

    def drain(self, timeout: float, stop: Callable[[], bool], on_waiting: Callable[[int], None]) -> None:
        """Drain the ingresses, until `timeout` seconds have passed or `stop` returns True."""
        self._send("drain")
        for event in self.events(timeout, stop):
            if "drained" in event:
                return
            if "waiting" in event:
                on_waiting(event["waiting"])

    def events(self, timeout: float, stop: Callable[[], bool] = lambda: False) -> Iterator[dict[str, Any]]:
        """Yield events until the process exits, `timeout` seconds have passed, or `stop` returns True."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not stop():
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=POLL_S)
                if event is None:
                    return
                yield event

    def end(self) -> None:
        """Kill the process if it runs."""
        self._process.kill()
        self._process.wait()

    def _send(self, command: str) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the process has died: there are no events to read either
            self._process.stdin.write(command.encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(b"{"):  # Ray prints to the same stream
                self._events.put(json.loads(line))
        self._process.wait()
        self._events.put(None)

"""Runs `llmrun_runtime.cluster.bootstrap` in a process of its own and reads its result. Imports no Ray."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

from llmrun.errors import ClusterError

TIMEOUT_S = 120


def run_bootstrap(action: str, env: dict[str, str], args: list[str], log: Path) -> None:
    """Run the bootstrap process to its end. Raises ClusterError."""
    finish_bootstrap(start_bootstrap(action, env, args, log), log)


def start_bootstrap(action: str, env: dict[str, str], args: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the bootstrap process. With `--stay` it waits for `finish_bootstrap` before it connects to Ray."""
    command = [sys.executable, "-m", "llmrun_runtime.cluster.bootstrap", action, *args]
    with log.open("wb") as errors:
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)


def finish_bootstrap(process: subprocess.Popen[bytes], log: Path, *, stays: bool = False) -> None:
    """Let the process begin and wait for its result. With `stays` it continues to run after success.

    Raises ClusterError.
    """
    assert process.stdin and process.stdout
    with contextlib.suppress(BrokenPipeError):  # the process has died, so there is no result to read either
        process.stdin.write(b"\n")
        process.stdin.flush()
    timer = threading.Timer(TIMEOUT_S, process.kill)
    timer.start()
    # Ray prints to the same stream.
    line = next((line for line in map(bytes.decode, process.stdout) if line.startswith("{")), "")
    timed_out = not timer.is_alive()
    timer.cancel()
    error: str | None = json.loads(line).get("error") if line else f"the bootstrap process failed: see {log}"
    if timed_out:
        error = f"the cluster did not respond within {TIMEOUT_S} s: see {log}"
    if error is not None or not stays:
        process.communicate()
    if error is not None:
        raise ClusterError(error)


def ingress_args(host: str, port: int, insecure: bool) -> list[str]:
    """The arguments for the action `start`."""
    args = ["--host", host, "--port", str(port), "--url", url_of(host, port)]
    return [*args, "--insecure"] if insecure else args


def url_of(host: str, port: int) -> str:
    """The URL at which clients on this machine reach a server that listens on `host`."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::", "localhost") else host
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
